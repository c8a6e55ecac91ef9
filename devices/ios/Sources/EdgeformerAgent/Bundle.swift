// A bundle on the phone: nothing of it is used before its signature, its expiry and every file's digest hold.

import CryptoKit
import Foundation

public struct Refused: Error, CustomStringConvertible {
    public let description: String
}

public struct Bundle {
    public static let target = "iphone-13"

    public let folder: URL
    public let manifest: Manifest
    public let digest: String

    /// `trusting`: public Ed25519 keys in hex. Throws `Refused` with the file and the rule it breaks.
    public init(folder: URL, trusting keys: [String], today: Date = Date()) throws {
        let data = try Data(contentsOf: folder.appendingPathComponent("manifest.json"))
        let mark = try JSONDecoder().decode(
            Signature.self, from: Data(contentsOf: folder.appendingPathComponent("manifest.sig")))
        guard mark.schema == "edgeformer.signature/1", keys.contains(mark.key),
            let key = bytes(mark.key), let signature = bytes(mark.signature),
            try Curve25519.Signing.PublicKey(rawRepresentation: key).isValidSignature(signature, for: data)
        else {
            throw Refused(description: "manifest.sig: not signed by a key this app trusts")
        }
        let manifest = try JSONDecoder().decode(Manifest.self, from: data)
        guard manifest.schema == "edgeformer.manifest/1" else {
            throw Refused(description: "manifest.json: schema \(manifest.schema) is not edgeformer.manifest/1")
        }
        guard manifest.target == Bundle.target else {
            throw Refused(description: "manifest.json: made for \(manifest.target), this app is for \(Bundle.target)")
        }
        guard manifest.expires >= day(today) else {
            throw Refused(description: "manifest.json: expired on \(manifest.expires)")
        }
        for (name, file) in manifest.files {
            try check(folder.appendingPathComponent(name), name, file)
        }
        self.folder = folder
        self.manifest = manifest
        self.digest = hex(SHA256.hash(data: data))
    }
}

private func check(_ url: URL, _ name: String, _ file: File) throws {
    if name.hasPrefix("/") || name.split(separator: "/", omittingEmptySubsequences: false).contains(where: { ["", ".", ".."].contains($0) }) {
        throw Refused(description: "\(name): leaves the bundle")
    }
    let data = try Data(contentsOf: url, options: .mappedIfSafe)
    if data.count != file.size || hex(SHA256.hash(data: data)) != file.sha256 {
        throw Refused(description: "\(name): not the file the manifest names")
    }
}

private func day(_ date: Date) -> String {
    let format = DateFormatter()
    format.calendar = Calendar(identifier: .iso8601)
    format.locale = Locale(identifier: "en_US_POSIX")
    format.timeZone = TimeZone(identifier: "UTC")
    format.dateFormat = "yyyy-MM-dd"
    return format.string(from: date)
}

func bytes(_ hex: String) -> Data? {
    let digits = Array(hex)
    guard digits.count % 2 == 0 else { return nil }
    var out = Data()
    for i in stride(from: 0, to: digits.count, by: 2) {
        guard let byte = UInt8(String(digits[i...i + 1]), radix: 16) else { return nil }
        out.append(byte)
    }
    return out
}
