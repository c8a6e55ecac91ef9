// JSON byte for byte as `wire.dump` writes it: sorted keys, one space of indentation, Python's numbers. A report's id is
// the digest of these bytes, so another spelling of 0.1 would be another report.

import CryptoKit
import Foundation

/// Any JSON value; integers and floating-point numbers stay apart.
public enum JSON: Codable, Equatable {
    case null
    case bool(Bool)
    case int(Int)
    case double(Double)
    case string(String)
    case array([JSON])
    case object([String: JSON])

    public init(from decoder: Decoder) throws {
        let value = try decoder.singleValueContainer()
        if value.decodeNil() {
            self = .null
        } else if let x = try? value.decode(Bool.self) {
            self = .bool(x)
        } else if let x = try? value.decode(Int.self) {
            self = .int(x)
        } else if let x = try? value.decode(Double.self) {
            self = .double(x)
        } else if let x = try? value.decode(String.self) {
            self = .string(x)
        } else if let x = try? value.decode([JSON].self) {
            self = .array(x)
        } else {
            self = .object(try value.decode([String: JSON].self))
        }
    }

    public func encode(to encoder: Encoder) throws {
        var container = encoder.singleValueContainer()
        switch self {
        case .null: try container.encodeNil()
        case .bool(let x): try container.encode(x)
        case .int(let x): try container.encode(x)
        case .double(let x): try container.encode(x)
        case .string(let x): try container.encode(x)
        case .array(let x): try container.encode(x)
        case .object(let x): try container.encode(x)
        }
    }

    /// A record of Wire.swift, or what is inside one. Every stored property is a key; an absent value is null.
    public init(reflecting any: Any) {
        switch any {
        case let x as JSON: self = x
        case let x as Bool: self = .bool(x)
        case let x as Int: self = .int(x)
        case let x as Double: self = .double(x)
        case let x as String: self = .string(x)
        default:
            let mirror = Mirror(reflecting: any)
            switch mirror.displayStyle {
            case .optional:
                self = mirror.children.first.map { JSON(reflecting: $0.value) } ?? .null
            case .collection:
                self = .array(mirror.children.map { JSON(reflecting: $0.value) })
            case .dictionary:
                var object: [String: JSON] = [:]
                for child in mirror.children {
                    let pair = Mirror(reflecting: child.value).children.map(\.value)
                    if let key = pair.first as? String, let value = pair.last {
                        object[key] = JSON(reflecting: value)
                    }
                }
                self = .object(object)
            default:
                let pairs = mirror.children.compactMap { child in
                    child.label.map { ($0, JSON(reflecting: child.value)) }
                }
                self = .object(Dictionary(uniqueKeysWithValues: pairs))
            }
        }
    }

    /// Python: json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    func text(indent: Int = 0) -> String {
        let inner = "\n" + String(repeating: " ", count: indent + 1)
        let outer = "\n" + String(repeating: " ", count: indent)
        switch self {
        case .null: return "null"
        case .bool(let x): return x ? "true" : "false"
        case .int(let x): return String(x)
        case .double(let x): return python(x)
        case .string(let x): return quoted(x)
        case .array(let items):
            if items.isEmpty { return "[]" }
            return "[" + items.map { inner + $0.text(indent: indent + 1) }.joined(separator: ",") + outer + "]"
        case .object(let items):
            if items.isEmpty { return "{}" }
            // By code point, as Python sorts; Swift's own order compares what characters look like.
            let keys = items.keys.sorted { $0.unicodeScalars.lexicographicallyPrecedes($1.unicodeScalars) }
            let lines = keys.map { inner + quoted($0) + ": " + items[$0]!.text(indent: indent + 1) }
            return "{" + lines.joined(separator: ",") + outer + "}"
        }
    }
}

extension Report {
    /// The bytes that are sent and stored.
    public var canonical: Data { Data((JSON(reflecting: self).text() + "\n").utf8) }

    /// The same report named by its content.
    public func named() -> Report {
        var copy = self
        copy.id = ""
        copy.id = hex(SHA256.hash(data: copy.canonical))
        return copy
    }
}

func hex<Bytes: Sequence>(_ bytes: Bytes) -> String where Bytes.Element == UInt8 {
    bytes.map { String(format: "%02x", $0) }.joined()
}

private func quoted(_ text: String) -> String {
    var out = "\""
    for scalar in text.unicodeScalars {
        switch scalar {
        case "\"": out += "\\\""
        case "\\": out += "\\\\"
        case "\n": out += "\\n"
        case "\r": out += "\\r"
        case "\t": out += "\\t"
        case "\u{8}": out += "\\b"
        case "\u{c}": out += "\\f"
        default:
            if scalar.value < 0x20 {
                out += String(format: "\\u%04x", scalar.value)
            } else {
                out.unicodeScalars.append(scalar)
            }
        }
    }
    return out + "\""
}

/// Python's repr: the shortest digits that read back as the same number, an exponent below 1e-4 and from 1e16 on.
private func python(_ x: Double) -> String {
    if x == 0 { return x.sign == .minus ? "-0.0" : "0.0" }
    let (digits, point) = shortest(abs(x))
    let sign = x < 0 ? "-" : ""
    if point > -4, point <= 16 {
        if point <= 0 { return sign + "0." + String(repeating: "0", count: -point) + digits }
        if digits.count <= point {
            return sign + digits + String(repeating: "0", count: point - digits.count) + ".0"
        }
        return sign + digits.prefix(point) + "." + digits.dropFirst(point)
    }
    let exponent = point - 1
    let fraction = digits.count > 1 ? "." + digits.dropFirst() : ""
    let size = abs(exponent) < 10 ? "0\(abs(exponent))" : "\(abs(exponent))"
    return sign + digits.prefix(1) + fraction + "e" + (exponent < 0 ? "-" : "+") + size
}

/// Digits d1d2... and the place of the point, so that the number is 0.d1d2... times 10 to that place.
private func shortest(_ x: Double) -> (String, Int) {
    let parts = x.description.lowercased().split(separator: "e")
    let exponent = parts.count > 1 ? Int(parts[1]) ?? 0 : 0
    let number = parts[0].split(separator: ".", omittingEmptySubsequences: false)
    let whole = String(number[0])
    let fraction = number.count > 1 ? String(number[1]) : ""
    let all = whole + fraction
    let leading = all.prefix { $0 == "0" }.count
    var digits = String(all.dropFirst(leading))
    while digits.count > 1, digits.hasSuffix("0") { digits.removeLast() }
    return (digits, whole.count - leading + exponent)
}
