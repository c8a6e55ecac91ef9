// A Core ML program of a bundle: one function a length. A row runs at the shortest length that holds it.

import CoreML
import Foundation

public final class Program {
    let entry: Entry
    private let compiled: URL
    private var functions: [Int: MLModel] = [:]
    private let units: MLComputeUnits

    /// Compiles the package on the phone; `path` of an entry is the Manifest.json inside the package.
    public init(bundle: Bundle, entry: Entry, units: MLComputeUnits = .all) async throws {
        self.entry = entry
        self.units = units
        let package = bundle.folder.appendingPathComponent(entry.path).deletingLastPathComponent()
        compiled = try await MLModel.compileModel(at: package)
    }

    deinit { try? FileManager.default.removeItem(at: compiled) }

    /// Opens the function of every length, so that no measured run pays for it.
    public func open() throws {
        for length in entry.lengths.isEmpty ? [0] : entry.lengths { _ = try function(length) }
    }

    public func run(_ row: [String: Array2]) throws -> [Double] {
        let natural = entry.lengths.isEmpty ? 0 : row.values.map { $0.shape[0] }.max() ?? 0
        guard let length = entry.lengths.isEmpty ? 0 : entry.lengths.first(where: { $0 >= natural }) else {
            throw Refused(description: "\(natural) tokens: this program holds at most \(entry.lengths.last ?? 0)")
        }
        let features = try MLDictionaryFeatureProvider(
            dictionary: Dictionary(
                uniqueKeysWithValues: entry.inputs.map { tensor in
                    guard let array = row[tensor.name] else {
                        throw Refused(description: "input \(tensor.name) is missing")
                    }
                    return (tensor.name, try padded(array, tensor, length))
                }))
        let output = try function(length).prediction(from: features)
        guard let found = output.featureValue(for: entry.outputs[0].name)?.multiArrayValue else {
            throw Refused(description: "the program gives no \(entry.outputs[0].name)")
        }
        return (0..<found.count).map { found[$0].doubleValue }
    }

    private func function(_ length: Int) throws -> MLModel {
        if let open = functions[length] { return open }
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        configuration.functionName = "length_\(length)"
        let model = try MLModel(contentsOf: compiled, configuration: configuration)
        functions[length] = model
        return model
    }
}

/// With a batch axis in front, filled up on the right with the input's own padding value.
private func padded(_ array: Array2, _ tensor: Tensor, _ length: Int) throws -> MLFeatureValue {
    let shape = length > 0 ? [length] + array.shape.dropFirst() : array.shape
    let type: MLMultiArrayDataType = tensor.dtype.hasPrefix("int") ? .int32 : .float16
    let filled = try MLMultiArray(shape: ([1] + shape).map { NSNumber(value: $0) }, dataType: type)
    for i in 0..<filled.count {
        filled[i] = NSNumber(value: i < array.values.count ? array.values[i] : tensor.pad)
    }
    return MLFeatureValue(multiArray: filled)
}
