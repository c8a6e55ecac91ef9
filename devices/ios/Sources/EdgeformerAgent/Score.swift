// How close outputs are to what the build machine computed with the same program, as devices/agent/score.py has it.

import Foundation

enum Score {
    /// One number a row, 1 is equal; a row with a value that is not finite has -1.
    static func similarity(_ task: Task, _ got: [[Double]], _ want: [[Double]]) throws -> [Double] {
        guard got.count == want.count, zip(got, want).allSatisfy({ $0.count == $1.count }) else {
            throw Refused(description: "outputs do not have the shape of the wanted ones")
        }
        let spread = max(deviation(want.flatMap { $0 }), 1e-6)
        return try zip(got, want).map { a, b in
            guard a.allSatisfy(\.isFinite) else { return -1 }
            switch task.kind {
            case "embedding": return cosine(a, b)
            case "classification": return 1 - zip(softmax(a), softmax(b)).map { abs($0 - $1) }.reduce(0, +) / 2
            case "regression": return 1 - (zip(a, b).map { abs($0 - $1) }.max() ?? 0) / spread
            default: throw Refused(description: "this agent does not judge \(task.kind)")
            }
        }
    }

    private static func cosine(_ a: [Double], _ b: [Double]) -> Double {
        func dot(_ x: [Double], _ y: [Double]) -> Double { zip(x, y).map(*).reduce(0, +) }
        return dot(a, b) / max((dot(a, a) * dot(b, b)).squareRoot(), 1e-30)
    }

    private static func softmax(_ x: [Double]) -> [Double] {
        let top = x.max() ?? 0
        let e = x.map { exp($0 - top) }
        let sum = e.reduce(0, +)
        return e.map { $0 / sum }
    }

    private static func deviation(_ x: [Double]) -> Double {
        let mean = x.reduce(0, +) / Double(max(x.count, 1))
        return (x.map { ($0 - mean) * ($0 - mean) }.reduce(0, +) / Double(max(x.count, 1))).squareRoot()
    }
}
