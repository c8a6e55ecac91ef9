// Rows and wanted outputs from the .npz of devices/agent/cases.py: a zip archive of arrays, stored and not compressed.

import Foundation

/// One array in row-major order. Token ids are whole numbers, which Double holds exactly.
public struct Array2 {
    public let shape: [Int]
    public let values: [Double]
}

public struct Rows {
    /// Row -> input name -> array without batch axis.
    public let inputs: [[String: Array2]]
    /// Output name -> one array a row.
    public let outputs: [String: [Array2]]

    public init(npz: URL) throws {
        var arrays: [String: Array2] = [:]
        for (name, data) in try members(Data(contentsOf: npz)) {
            arrays[name.replacingOccurrences(of: ".npy", with: "")] = try array(data, name)
        }
        var lists: [String: [Array2]] = [:]
        for name in arrays.keys where name.hasSuffix(".values") {
            let key = String(name.dropLast(".values".count))
            lists[key] = try split(arrays, key)
        }
        let named = lists.filter { $0.key.hasPrefix("input.") }
        guard let count = named.values.first?.count, lists.values.allSatisfy({ $0.count == count }) else {
            throw Refused(description: "\(npz.lastPathComponent): inputs and outputs differ in their number of rows")
        }
        inputs = (0..<count).map { i in
            Dictionary(uniqueKeysWithValues: named.map { (String($0.key.dropFirst("input.".count)), $0.value[i]) })
        }
        outputs = Dictionary(
            uniqueKeysWithValues: lists.filter { $0.key.hasPrefix("output.") }
                .map { (String($0.key.dropFirst("output.".count)), $0.value) })
    }
}

private func split(_ arrays: [String: Array2], _ name: String) throws -> [Array2] {
    guard let values = arrays[name + ".values"], let shapes = arrays[name + ".shapes"], shapes.shape.count == 2 else {
        throw Refused(description: "\(name): values without shapes")
    }
    var place = 0
    return try (0..<shapes.shape[0]).map { i in
        let axes = shapes.shape[1]
        let shape = (0..<axes).map { Int(shapes.values[i * axes + $0]) }
        let size = shape.reduce(1, *)
        guard place + size <= values.values.count else { throw Refused(description: "\(name): too few values") }
        defer { place += size }
        return Array2(shape: shape, values: Swift.Array(values.values[place..<place + size]))
    }
}

private func number(_ data: Data, _ at: Int, _ size: Int) -> Int {
    (0..<size).reduce(0) { $0 | Int(data[data.startIndex + at + $1]) << (8 * $1) }
}

/// Name and content of each member, from the archive's central directory.
private func members(_ data: Data) throws -> [(String, Data)] {
    let bad = Refused(description: "not an uncompressed .npz")
    var end = data.count - 22
    while end >= 0, number(data, end, 4) != 0x0605_4b50 { end -= 1 }
    guard end >= 0 else { throw bad }
    var place = number(data, end + 16, 4)
    return try (0..<number(data, end + 10, 2)).map { _ in
        guard place + 46 <= data.count, number(data, place, 4) == 0x0201_4b50, number(data, place + 10, 2) == 0 else {
            throw bad
        }
        let size = number(data, place + 24, 4), local = number(data, place + 42, 4)
        let name = String(decoding: data[(place + 46)..<(place + 46 + number(data, place + 28, 2))], as: UTF8.self)
        place += 46 + number(data, place + 28, 2) + number(data, place + 30, 2) + number(data, place + 32, 2)
        let start = local + 30 + number(data, local + 26, 2) + number(data, local + 28, 2)
        guard start + size <= data.count else { throw bad }
        return (name, data.subdata(in: start..<start + size))
    }
}

/// The .npy formats that numpy writes for little-endian numbers in row-major order.
private func array(_ data: Data, _ name: String) throws -> Array2 {
    let wide = data[6] > 1
    let start = (wide ? 12 : 10) + number(data, 8, wide ? 4 : 2)
    let header = String(decoding: data[(wide ? 12 : 10)..<start], as: UTF8.self)
    guard header.contains("'fortran_order': False"),
        let type = header.firstMatch(of: /'descr': '[<|]([fi][0-9])'/)?.1,
        let axes = header.firstMatch(of: /'shape': \(([0-9, ]*)\)/)?.1
    else { throw Refused(description: "\(name): \(header)") }
    let shape = axes.split(separator: ",").compactMap { Int($0.trimmingCharacters(in: .whitespaces)) }
    let count = shape.reduce(1, *)
    let body = data.subdata(in: start..<data.count)
    func read<T>(_: T.Type, _ convert: (T) -> Double) -> [Double] {
        body.withUnsafeBytes { raw in
            (0..<count).map { convert(raw.loadUnaligned(fromByteOffset: $0 * MemoryLayout<T>.size, as: T.self)) }
        }
    }
    guard let size = Int(type.dropFirst()), body.count >= count * size else {
        throw Refused(description: "\(name): ends too early")
    }
    switch type {
    case "f4": return Array2(shape: shape, values: read(Float.self) { Double($0) })
    case "f8": return Array2(shape: shape, values: read(Double.self) { $0 })
    case "i4": return Array2(shape: shape, values: read(Int32.self) { Double($0) })
    case "i8": return Array2(shape: shape, values: read(Int64.self) { Double($0) })
    default: throw Refused(description: "\(name): numbers of type \(type)")
    }
}
