// The expected texts are Python's own: tests/test_ios.py holds each pair below against repr() and json.dumps.

import XCTest

@testable import EdgeformerAgent

final class CanonicalTests: XCTestCase {
    func testNumbersAreWrittenAsPythonWritesThem() {
        let pairs: [(String, Double)] = [
            ("0.1", 0.1),
            ("1.0", 1),
            ("0.0", 0),
            ("-0.0", -0.0),
            ("100.0", 100),
            ("-2.5", -2.5),
            ("0.0001", 0.0001),
            ("1e-05", 0.00001),
            ("1.5e-07", 1.5e-7),
            ("123456789012345.0", 123456789012345),
            ("9007199254740992.0", 9007199254740992),
            ("1e+16", 1e16),
            ("1.7976931348623157e+308", 1.7976931348623157e308),
        ]
        for (text, number) in pairs {
            XCTAssertEqual(JSON.double(number).text(), text)
        }
    }

    func testKeysAreSortedByCodePointAndTextIsEscapedAsLittleAsPossible() {
        let value = JSON.object(["zz": .null, "\u{e9}": .string("a\n\u{7}"), "Z": .array([]), "a": .object([:])])
        XCTAssertEqual(value.text(), "{\n \"Z\": [],\n \"a\": {},\n \"zz\": null,\n \"\u{e9}\": \"a\\n\\u0007\"\n}")
    }

    func testPercentilesInterpolate() {
        let found = summary([1000, 2000, 3000, 4000], 0, 1, [8])
        XCTAssertEqual(found.p50_ms, 2.5, accuracy: 1e-9)
        XCTAssertEqual(found.p90_ms, 3.7, accuracy: 1e-9)
    }
}
