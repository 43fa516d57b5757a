/** JPEG lossless beyond what dcmtk writes: restarts, shifted and damaged pictures. What it writes is in dicom.test.ts. */
import { describe, expect, it } from "vitest";
import { decodeJpegLossless } from "../src/core/dicomJpeg.ts";

const [ROWS, COLUMNS] = [12, 9];
const picture = Int32Array.from({ length: ROWS * COLUMNS }, (_, i) => (i * i * 37 + 11 * i) % 4096);

/** Prediction from the left; each of the 17 sizes has a code of five bits. */
function encoded({ restart = 0, shift = 0, precision = 12 } = {}): Uint8Array {
  const bytes = [0xff, 0xd8, 0xff, 0xc4, 0, 36, 0, 0, 0, 0, 0, 17, ...Array<number>(11).fill(0),
    ...Array.from({ length: 17 }, (_, i) => i), 0xff, 0xc3, 0, 11, precision, 0, ROWS, 0, COLUMNS, 1, 1, 0x11, 0,
    0xff, 0xdd, 0, 4, 0, restart * COLUMNS, 0xff, 0xda, 0, 8, 1, 1, 0, 1, 0, shift];
  let [byte, count] = [0, 0];
  const put = (value: number, bits: number) => {
    for (let i = bits - 1; i >= 0; i--) {
      byte = byte * 2 + ((value >> i) & 1);
      if (++count < 8) continue;
      bytes.push(byte, ...(byte === 0xff ? [0] : []));
      [byte, count] = [0, 0];
    }
  };
  const flush = () => {
    while (count) put(1, 1);
  };
  for (let y = 0; y < ROWS; y++) {
    if (restart && y && y % restart === 0) {
      flush();
      bytes.push(0xff, 0xd0 + ((y / restart - 1) & 7));
    }
    const fresh = y === 0 || (restart > 0 && y % restart === 0);
    for (let x = 0; x < COLUMNS; x++) {
      const i = y * COLUMNS + x;
      const expected = x ? picture[i - 1]! >> shift : fresh ? 1 << (precision - shift - 1) : picture[i - COLUMNS]! >> shift;
      const difference = (picture[i]! >> shift) - expected;
      const size = 32 - Math.clz32(Math.abs(difference));
      put(size, 5);
      put(difference < 0 ? difference - 1 + (1 << size) : difference, size);
    }
  }
  flush();
  return Uint8Array.from([...bytes, 0xff, 0xd9]);
}

describe("JPEG lossless", () => {
  it("comes back whole, with restarts and shifted", () => {
    for (const restart of [0, 1, 5]) {
      const found = decodeJpegLossless(encoded({ restart }), ROWS, COLUMNS)!;
      expect([found.precision, found.values]).toEqual([12, picture]);
    }
    expect(decodeJpegLossless(encoded({ shift: 3 }), ROWS, COLUMNS)!.values).toEqual(picture.map((v) => (v >> 3) << 3));
  });

  it("is refused where it is cut, of another size, or of another kind", () => {
    const whole = encoded({ restart: 5 });
    for (let n = 0; n < whole.length - 2; n++) expect(decodeJpegLossless(whole.subarray(0, n), ROWS, COLUMNS)).toBeNull();
    expect(decodeJpegLossless(whole, COLUMNS, ROWS)).toBeNull();
    const baseline = whole.slice();
    baseline[baseline.indexOf(0xc3)] = 0xc0;
    expect(decodeJpegLossless(baseline, ROWS, COLUMNS)).toBeNull();
  });

  it("with spoiled bytes is read or refused, and never crashes", () => {
    let [seed, refusals] = [1, 0];
    const random = (n: number) => (seed = (seed * 48271) % 2147483647) % n;
    for (let i = 0; i < 2000; i++) {
      const hurt = encoded({ restart: 4 });
      for (let k = 0; k < 2; k++) hurt[random(hurt.length)] = random(256);
      const found = decodeJpegLossless(hurt, ROWS, COLUMNS);
      if (found) expect(found.values.length).toBe(ROWS * COLUMNS);
      else refusals++;
    }
    expect(refusals).toBeGreaterThan(500);
  });
});
