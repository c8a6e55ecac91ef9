// Self-check, warm-up, steady run, report: what devices/agent does on a board, for the one format an iPhone has.

import Foundation
import UIKit

public enum Profile: String {
    case `default`, quick

    var minimum: (warmup: Int, runs: Int, seconds: Double) {
        self == .quick ? (2, 10, 0.5) : (5, 100, 10)
    }
}

public final class Agent {
    static let version = "0.1.0"
    private let bundle: Bundle

    public init(bundle folder: URL, trusting keys: [String]) throws {
        bundle = try Bundle(folder: folder, trusting: keys)
    }

    public func run(profile: Profile = .default) async throws -> Report {
        let started = ISO8601DateFormatter().string(from: Date())
        var results: [Result] = []
        var skipped: [String: String] = [:]
        for entry in bundle.manifest.programs {
            if entry.format != "coreml" {
                skipped[entry.name] = "an iPhone opens Core ML programs only"
                continue
            }
            do {
                results.append(try await measure(entry, profile))
            } catch {
                skipped[entry.name] = "\(error)"
            }
        }
        let passed = results.filter { $0.golden.passed && $0.latency != nil }
        return Report(
            schema: "edgeformer.report/1", id: "", bundle: bundle.digest, name: bundle.manifest.name,
            version: bundle.manifest.version, target: bundle.manifest.target, kind: "measured", started: started,
            agent: Agent.version, profile: profile.rawValue, device: Phone.facts(), results: results, skipped: skipped,
            selected: passed.min { $0.latency!.p50_ms < $1.latency!.p50_ms }?.program
        ).named()
    }

    private func measure(_ entry: Entry, _ profile: Profile) async throws -> Result {
        let held = Phone.residentMB()
        let opening = DispatchTime.now()
        let program = try await Program(bundle: bundle, entry: entry)
        try program.open()
        let load = milliseconds(since: opening)
        let cases = bundle.manifest.cases
        let golden = try Rows(npz: bundle.folder.appendingPathComponent(cases.golden))
        let first = DispatchTime.now()
        var outputs = [try program.run(golden.inputs[0])]
        let firstMs = milliseconds(since: first)
        outputs += try golden.inputs.dropFirst().map(program.run)
        let wanted = (golden.outputs[entry.name] ?? []).map(\.values)
        let worst = try Score.similarity(bundle.manifest.task, outputs, wanted).min() ?? -1
        let passed = worst >= entry.golden_similarity
        let before = Phone.snapshot()
        let rows = try Rows(npz: bundle.folder.appendingPathComponent(cases.evaluation)).inputs
        let latency = passed ? try steady(program, rows, profile) : nil
        let peak = Phone.residentMB()
        return Result(
            program: entry.name, format: entry.format, precision: entry.precision,
            runtime_version: Phone.system(), threads: 1, import_ms: 0, load_ms: load, first_ms: firstMs,
            golden: Golden(rows: outputs.count, worst: worst, floor: entry.golden_similarity, passed: passed),
            latency: latency, memory: Memory(peak_rss_mb: peak, growth_mb: max(peak - held, 0), pss_mb: nil),
            energy: nil, fidelity: nil, before: before, after: Phone.snapshot(),
            flags: passed ? [] : ["self_check_failed"], native: nil, profile: [])
    }

    /// Whole passes over the rows, in their order, until both minima are reached.
    private func steady(_ program: Program, _ rows: [[String: Array2]], _ profile: Profile) throws -> Latency {
        let least = profile.minimum
        for i in 0..<least.warmup { _ = try program.run(rows[i % rows.count]) }
        var samples: [Int] = []
        let start = DispatchTime.now()
        while samples.count < least.runs || milliseconds(since: start) < 1000 * least.seconds {
            for row in rows {
                let one = DispatchTime.now()
                _ = try program.run(row)
                samples.append(Int((1000 * milliseconds(since: one)).rounded()))
            }
        }
        let seconds = milliseconds(since: start) / 1000
        let lengths = rows.map { $0["input_ids"]?.shape[0] ?? 0 }
        return summary(samples, least.warmup, seconds, lengths)
    }
}

func milliseconds(since start: DispatchTime) -> Double {
    Double(DispatchTime.now().uptimeNanoseconds - start.uptimeNanoseconds) / 1e6
}

/// Every figure from the samples, which are in microseconds; percentiles interpolate between neighbours.
func summary(_ samples: [Int], _ warmup: Int, _ seconds: Double, _ lengths: [Int]) -> Latency {
    let ms = samples.map { Double($0) / 1000 }.sorted()
    let mean = ms.reduce(0, +) / Double(ms.count)
    let variance = ms.map { ($0 - mean) * ($0 - mean) }.reduce(0, +) / Double(ms.count)
    func percentile(_ share: Double) -> Double {
        let place = share * Double(ms.count - 1)
        let low = Int(place.rounded(.down))
        return ms[low] + (ms[min(low + 1, ms.count - 1)] - ms[low]) * (place - Double(low))
    }
    return Latency(
        warmup: warmup, n: samples.count, seconds: seconds, mean_ms: mean, std_ms: variance.squareRoot(),
        min_ms: ms[0], p50_ms: percentile(0.5), p90_ms: percentile(0.9), p95_ms: percentile(0.95),
        p99_ms: percentile(0.99), samples_us: samples, row_lengths: lengths)
}

/// Facts that explain a number. iOS states no power draw and no clock.
enum Phone {
    static func system() -> String {
        let version = ProcessInfo.processInfo.operatingSystemVersion
        return "\(version.majorVersion).\(version.minorVersion).\(version.patchVersion)"
    }

    static func facts() -> [String: JSON] {
        var name = utsname()
        uname(&name)
        let machine = withUnsafeBytes(of: &name.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
        return [
            "model": .string(machine), "os": .string("iOS " + system()), "emulation": .null,
            "cores": .int(ProcessInfo.processInfo.processorCount),
            "memory_mb": .int(Int(ProcessInfo.processInfo.physicalMemory >> 20)),
            "no_energy": .string("iOS tells no app what it draws"),
        ]
    }

    static func snapshot() -> [String: JSON] {
        UIDevice.current.isBatteryMonitoringEnabled = true
        let states: [ProcessInfo.ThermalState: String] = [
            .nominal: "nominal", .fair: "fair", .serious: "serious", .critical: "critical",
        ]
        let level = UIDevice.current.batteryLevel
        return [
            "thermal_state": .string(states[ProcessInfo.processInfo.thermalState] ?? "unknown"),
            "battery_pct": level < 0 ? .null : .int(Int((100 * level).rounded())),
            "charging": .bool([.charging, .full].contains(UIDevice.current.batteryState)),
            "low_power_mode": .bool(ProcessInfo.processInfo.isLowPowerModeEnabled),
        ]
    }

    /// What the system charges this process with, in MB.
    static func residentMB() -> Double {
        var info = task_vm_info_data_t()
        var count = mach_msg_type_number_t(MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<natural_t>.size)
        let status = withUnsafeMutablePointer(to: &info) {
            $0.withMemoryRebound(to: integer_t.self, capacity: Int(count)) {
                task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count)
            }
        }
        return status == KERN_SUCCESS ? Double(info.phys_footprint) / 1_048_576 : 0
    }
}
