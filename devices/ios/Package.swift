// swift-tools-version:5.10
import PackageDescription

let package = Package(
    name: "EdgeformerAgent",
    platforms: [.iOS(.v18)],  // several functions in one Core ML program
    products: [.library(name: "EdgeformerAgent", targets: ["EdgeformerAgent"])],
    targets: [
        .target(name: "EdgeformerAgent"),
        .testTarget(name: "EdgeformerAgentTests", dependencies: ["EdgeformerAgent"]),
    ]
)
