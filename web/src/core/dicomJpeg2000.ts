/** One slice compressed as JPEG 2000, by OpenJPEG; what is cut is refused before, for OpenJPEG would guess the rest. */
import type { Samples } from "./dicomJpeg.ts";

const [SOC, SIZ, SOT, EOC] = [0xff4f, 0xff51, 0xff90, 0xffd9];
/** Of one component. */
const SIZ_BYTES = 43;
const SOT_BYTES = 12;

/** What is used of OpenJPEG's module. */
export interface OpenJpeg {
  J2KDecoder: new () => {
    getEncodedBuffer(length: number): Uint8Array;
    getDecodedBuffer(): Uint8Array;
    decode(): void;
    getIsReversible(): boolean;
    delete(): void;
  };
}

/** Null where the bytes are no such picture of `rows` and `columns`, compressed without loss. */
export function decodeJpeg2000(openjpeg: OpenJpeg, bytes: Uint8Array, rows: number, columns: number): Samples | null {
  const precision = precisionOf(bytes, rows, columns);
  if (precision === null || !isWhole(bytes)) return null;
  const decoder = new openjpeg.J2KDecoder();
  try {
    decoder.getEncodedBuffer(bytes.length).set(bytes);
    decoder.decode();
    if (!decoder.getIsReversible()) return null;
    const size = precision > 8 ? 2 : 1;
    // A copy, for the memory that it lies in grows and moves.
    const raw = decoder.getDecodedBuffer().slice();
    if (raw.length !== rows * columns * size) return null;
    const stored = size === 2 ? new Uint16Array(raw.buffer) : raw;
    return { values: Int32Array.from(stored, (v) => v & ((1 << precision) - 1)), precision };
  } catch {
    return null; // OpenJPEG throws pointers and texts of its own.
  } finally {
    try {
      decoder.delete();
    } catch {
      // Of a module that aborted; the scan is refused anyway.
    }
  }
}

/** Bits a sample, where the header is that of one component of this size. *Source*: ITU-T T.800 section A.5.1. */
function precisionOf(bytes: Uint8Array, rows: number, columns: number): number | null {
  if (bytes.length < SIZ_BYTES) return null;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (view.getUint16(0) !== SOC || view.getUint16(2) !== SIZ || view.getUint16(40) !== 1) return null;
  const [width, height] = [view.getUint32(8) - view.getUint32(16), view.getUint32(12) - view.getUint32(20)];
  // The highest bit says whether they are signed; the slice's PixelRepresentation is what counts.
  const precision = (view.getUint8(42) & 0x7f) + 1;
  return width === columns && height === rows && precision <= 16 ? precision : null;
}

/** Whether every tile-part is there, up to the end marker. *Source*: ITU-T T.800 annex A. */
function isWhole(bytes: Uint8Array): boolean {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let at = 2;
  // The main header: markers, each with its length, up to the first tile-part.
  for (; at + 4 <= bytes.length && view.getUint16(at) !== SOT; at += 2 + view.getUint16(at + 2)) {
    if (bytes[at] !== 0xff) return false;
  }
  let parts = 0;
  for (; at + SOT_BYTES <= bytes.length && view.getUint16(at) === SOT; parts++) {
    const length = view.getUint32(at + 6);
    // 0: the last tile-part, up to the end marker; a byte of padding may stand behind that.
    if (length === 0) return [2, 3].some((n) => view.getUint16(bytes.length - n) === EOC);
    if (length < SOT_BYTES) return false;
    at += length;
  }
  return parts > 0 && at + 2 <= bytes.length && view.getUint16(at) === EOC;
}
