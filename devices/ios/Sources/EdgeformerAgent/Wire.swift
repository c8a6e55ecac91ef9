// The records of devices/agent/wire.py that a phone reads and writes. tests/test_ios.py holds names, order and types.

import Foundation

public struct Tensor: Codable {
    public var name: String
    public var dtype: String
    public var shape: [Int]
    public var pad: Double
}

public struct Work: Codable {
    public var length: Int
    public var flops: Double
    public var int8_ops: Double
    public var weight_bytes: Double
    public var activation_bytes: Double
}

public struct Metrics: Codable {
    public var latency_ms: Double?
    public var latency_p90_ms: Double?
    public var memory_mb: Double?
    public var energy_mj: Double?
    public var accuracy: Double?
}

public struct Prediction: Codable {
    public var device: String
    public var threads: Int
    public var metrics: Metrics
    public var low: Double
    public var high: Double
    public var method: String
    public var kind: String
}

public struct Fidelity: Codable {
    public var measure: String
    public var mean: Double
    public var worst: Double
    public var max_abs: Double
    public var rows: Int
    public var metric: String?
    public var value: Double?
    public var reference: Double?
    public var also: [String: Double]
}

public struct Runtime: Codable {
    public var package: String
    public var minimum: String
    public var below: String
}

public struct Needs: Codable {
    public var glibc: String?
    public var isa: [String]
}

public struct Entry: Codable {
    public var name: String
    public var format: String
    public var precision: String
    public var path: String
    public var size_bytes: Int
    public var inputs: [Tensor]
    public var outputs: [Tensor]
    public var lengths: [Int]
    public var runtime: Runtime
    public var needs: Needs
    public var work: [Work]
    public var predicted: Prediction
    public var checked: Fidelity
    public var golden_similarity: Double
    public var libraries: [String: String]
}

public struct Task: Codable {
    public var kind: String
    public var metric: String?
    public var paired: Bool
    public var labels: [String]
}

public struct Gate: Codable {
    public var metric_ratio: Double
    public var cosine: Double
    public var agreement: Double
    public var correlation: Double
    public var loosened: Bool
}

public struct Step: Codable {
    public var name: String
    public var facts: [String: JSON]
}

public struct Cases: Codable {
    public var golden: String
    public var evaluation: String
    public var rows: Int
    public var source: String
}

public struct File: Codable {
    public var size: Int
    public var sha256: String
}

public struct Manifest: Codable {
    public var schema: String
    public var name: String
    public var version: Int
    public var target: String
    public var expires: String
    public var builder: String
    public var task: Task
    public var programs: [Entry]
    public var history: [Step]
    public var gate: Gate
    public var cases: Cases
    public var files: [String: File]
}

public struct Signature: Codable {
    public var schema: String
    public var key: String
    public var signature: String
}

public struct Latency: Codable {
    public var warmup: Int
    public var n: Int
    public var seconds: Double
    public var mean_ms: Double
    public var std_ms: Double
    public var min_ms: Double
    public var p50_ms: Double
    public var p90_ms: Double
    public var p95_ms: Double
    public var p99_ms: Double
    public var samples_us: [Int]
    public var row_lengths: [Int]
}

public struct Memory: Codable {
    public var peak_rss_mb: Double
    public var growth_mb: Double
    public var pss_mb: Double?
}

public struct Energy: Codable {
    public var source: String
    public var method: String
    public var total_mj: Double
    public var above_idle_mj: Double
    public var idle_w: Double
    public var seconds: Double
    public var samples: Int
    public var inferences: Int
}

public struct Golden: Codable {
    public var rows: Int
    public var worst: Double
    public var floor: Double
    public var passed: Bool
}

public struct Native: Codable {
    public var calls_per_run: Int
    public var kernel_set: String
    public var kept: [Double]
}

public struct Spent: Codable {
    public var `operator`: String
    public var ms: Double
}

public struct Result: Codable {
    public var program: String
    public var format: String
    public var precision: String
    public var runtime_version: String
    public var threads: Int
    public var import_ms: Double
    public var load_ms: Double
    public var first_ms: Double
    public var golden: Golden
    public var latency: Latency?
    public var memory: Memory
    public var energy: Energy?
    public var fidelity: Fidelity?
    public var before: [String: JSON]
    public var after: [String: JSON]
    public var flags: [String]
    public var native: Native?
    public var profile: [Spent]
}

public struct Report: Codable {
    public var schema: String
    public var id: String
    public var bundle: String
    public var name: String
    public var version: Int
    public var target: String
    public var kind: String
    public var started: String
    public var agent: String
    public var profile: String
    public var device: [String: JSON]
    public var results: [Result]
    public var skipped: [String: String]
    public var selected: String?
}
