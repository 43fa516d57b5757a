/**
 * One slice compressed as JPEG lossless: Huffman codes of differences from a prediction.
 *
 * *Source*: ITU-T T.81, annexes C, F.2.2 and H. Lengths and tables are bounded before they are used.
 */

/** Samples [rows, columns] without their sign, and the bits of each; null where the bytes are no such picture. */
export interface Samples {
  values: Int32Array;
  precision: number;
}

const [SOF3, DHT, SOI, EOI, SOS, DRI] = [0xc3, 0xc4, 0xd8, 0xd9, 0xda, 0xdd];
const MAX_BITS = 16;

interface Frame {
  precision: number;
  rows: number;
  columns: number;
}

export function decodeJpegLossless(bytes: Uint8Array, rows: number, columns: number): Samples | null {
  const tables = new Map<number, Huffman>();
  let [frame, restart] = [null as Frame | null, 0];
  if (bytes[0] !== 0xff || bytes[1] !== SOI) return null;
  for (let at = 2; at + 4 <= bytes.length;) {
    if (bytes[at] !== 0xff) return null;
    const marker = bytes[at + 1]!;
    if (marker === 0xff) {
      at++; // Fill bytes may stand before a marker.
      continue;
    }
    const length = bytes[at + 2]! * 256 + bytes[at + 3]!;
    if (marker === EOI || length < 2 || at + 2 + length > bytes.length) return null;
    const part = bytes.subarray(at + 4, at + 2 + length);
    at += 2 + length;
    if (marker === SOF3) {
      if (part.length !== 9 || part[5] !== 1) return null;
      frame = { precision: part[0]!, rows: part[1]! * 256 + part[2]!, columns: part[3]! * 256 + part[4]! };
      if (frame.precision < 2 || frame.precision > 16 || frame.rows !== rows || frame.columns !== columns) return null;
    } else if (marker === DHT) {
      if (!readTables(part, tables)) return null;
    } else if (marker === DRI) {
      if (part.length !== 2) return null;
      restart = part[0]! * 256 + part[1]!;
    } else if (marker === SOS) {
      if (!frame || part.length !== 6 || part[0] !== 1) return null;
      const [table, predictor, shift] = [tables.get(part[2]! >> 4), part[3]!, part[5]! & 15];
      // Restarts come behind whole rows. *Source*: T.81 section H.1.2.1.
      if (!table || predictor < 1 || predictor > 7 || shift >= frame.precision || restart % columns) return null;
      const values = scanned(new Bits(bytes, at), frame, table, predictor, shift, restart / columns);
      return values && { values, precision: frame.precision };
    } else if (marker >= 0xc0 && marker <= 0xcf) {
      return null; // Another kind of JPEG.
    }
  }
  return null;
}

/** Code lengths to symbols; false where they make no code. */
function readTables(part: Uint8Array, tables: Map<number, Huffman>): boolean {
  for (let at = 0; at < part.length;) {
    if (at + 17 > part.length) return false;
    const counts = part.subarray(at + 1, at + 17);
    const total = counts.reduce((a, b) => a + b, 0);
    const symbols = part.subarray(at + 17, at + 17 + total);
    if (symbols.length !== total || symbols.some((s) => s > 16)) return false;
    tables.set(part[at]! & 15, new Huffman(counts, symbols));
    at += 17 + total;
  }
  return true;
}

/** A canonical Huffman code: per length the largest code, and where its symbols begin. *Source*: T.81 F.2.2.3. */
class Huffman {
  private readonly largest = new Int32Array(MAX_BITS + 1).fill(-1);
  private readonly offset = new Int32Array(MAX_BITS + 1);

  constructor(counts: Uint8Array, private readonly symbols: Uint8Array) {
    let [code, first] = [0, 0];
    for (let length = 1; length <= MAX_BITS; length++, code <<= 1) {
      this.offset[length] = first - code;
      code += counts[length - 1]!;
      first += counts[length - 1]!;
      if (counts[length - 1]) this.largest[length] = code - 1;
    }
  }

  /** -1 where the bits are no code. */
  next(bits: Bits): number {
    let code = 0;
    for (let length = 1; length <= MAX_BITS; length++) {
      code = code * 2 + bits.one();
      if (code <= this.largest[length]!) return this.symbols[this.offset[length]! + code] ?? -1;
    }
    return -1;
  }
}

/** The bits behind a scan's header; a stuffed zero behind 0xff is left out, and at a marker they end. */
class Bits {
  /** Whether more were taken than there are. */
  ended = false;
  private byte = 0;
  private left = 0;

  constructor(private readonly bytes: Uint8Array, private at: number) {}

  one(): number {
    if (this.left === 0) this.fill();
    this.left--;
    return (this.byte >> this.left) & 1;
  }

  many(count: number): number {
    let value = 0;
    for (let i = 0; i < count; i++) value = value * 2 + this.one();
    return value;
  }

  /** Past the restart marker that must stand here. */
  restart(number: number): boolean {
    this.left = 0;
    if (this.bytes[this.at] !== 0xff || this.bytes[this.at + 1] !== 0xd0 + (number & 7)) return false;
    this.at += 2;
    return true;
  }

  private fill() {
    const byte = this.bytes[this.at];
    const stuffed = byte === 0xff;
    if (byte === undefined || (stuffed && this.bytes[this.at + 1] !== 0)) this.ended = true;
    else this.at += stuffed ? 2 : 1;
    this.byte = this.ended ? 0 : byte!;
    this.left = 8;
  }
}

function scanned(bits: Bits, { precision, rows, columns }: Frame, table: Huffman, predictor: number, shift: number,
  rowsToRestart: number): Int32Array | null {
  const out = new Int32Array(rows * columns);
  for (let y = 0, i = 0, fresh = true; y < rows; y++, fresh = false) {
    if (rowsToRestart && y && y % rowsToRestart === 0) {
      if (!bits.restart(y / rowsToRestart - 1)) return null;
      fresh = true;
    }
    for (let x = 0; x < columns; x++, i++) {
      const size = table.next(bits);
      if (size < 0) return null;
      const [left, up, corner] = [out[i - 1]!, out[i - columns]!, out[i - columns - 1]!];
      const expected = x === 0 ? (fresh ? 1 << (precision - shift - 1) : up)
        : fresh ? left : predicted(predictor, left, up, corner);
      out[i] = (expected + difference(bits, size)) & 0xffff;
    }
    if (bits.ended) return null;
  }
  if (shift) for (let i = 0; i < out.length; i++) out[i] = (out[i]! << shift) & 0xffff;
  return out;
}

/** *Source*: T.81 table H.1. */
function predicted(predictor: number, left: number, up: number, corner: number): number {
  switch (predictor) {
    case 1: return left;
    case 2: return up;
    case 3: return corner;
    case 4: return left + up - corner;
    case 5: return left + ((up - corner) >> 1);
    case 6: return up + ((left - corner) >> 1);
    default: return (left + up) >> 1;
  }
}

/** A difference of so many bits; 16 stands for 32768 alone. *Source*: T.81 table H.2. */
function difference(bits: Bits, size: number): number {
  if (size === 0) return 0;
  if (size === 16) return 32768;
  const value = bits.many(size);
  return value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
}
