/** The pixels of one DICOM slice as Hounsfield units: native in both byte orders, run-length encoded, or as JPEG. */
import { JPEG_2000_LOSSLESS, JPEG_LOSSLESS, RLE, type CtSlice } from "./dicomFile.ts";
import { decodeJpegLossless, type Samples } from "./dicomJpeg.ts";
import { corrupt, EXPLICIT_BIG, parseDicom, PIXEL_DATA, type DicomFile } from "./dicomParse.ts";
import { paddingMask } from "./dicomPadding.ts";
import { tagInteger, TAGS } from "./dicomTags.ts";

const UNDEFINED = 0xffffffff;
const AIR_HU = -1024;
const [ITEM, SEQUENCE_END] = [0xfffee000, 0xfffee0dd];

export interface HuSlice {
  /** [rows, columns]. */
  hu: Float32Array;
  /** Whether bits above BitsStored were dropped. */
  dropped: boolean;
  /** Pixels that were padding and no air yet. */
  padded: number;
}

/** A compressed picture's samples; null where the bytes are none. */
export type DecodeSamples = (bytes: Uint8Array, rows: number, columns: number) => Samples | null;

/** The slice's numbers; `bytes` are its whole file. `jpeg2000` is asked where the slice is compressed so. */
export function decodeHu(bytes: Uint8Array, slice: CtSlice, where: string, jpeg2000: DecodeSamples | null): HuSlice {
  const file = parseDicom(bytes, where);
  const element = file.elements.get(PIXEL_DATA);
  if (!element) throw corrupt(where, "it is cut inside its pixels");
  const bits = tagInteger(file, "BitsAllocated", where);
  const signed = tagInteger(file, "PixelRepresentation", where, 0) === 1;
  const count = slice.rows * slice.columns;
  let whole: Int32Array | Float64Array;
  const decode = JPEG_LOSSLESS.includes(file.syntax) ? decodeJpegLossless
    : file.syntax === JPEG_2000_LOSSLESS ? jpeg2000 : null;
  if (decode) {
    const stored = decompressed(decode, file, element.start, slice, signed, where);
    return withAir(stored, stored, null, file, slice, signed, where);
  }
  if (file.syntax === RLE) {
    whole = numbers(unpacked(file, element.start, count, bits / 8, where), count, bits, signed, true);
  } else {
    const expected = (count * bits) / 8;
    const there = Math.min(element.length, bytes.length - element.start);
    if (there < expected || element.length === UNDEFINED || element.start + element.length > bytes.length) {
      throw corrupt(where, `expected ${expected} bytes of pixels, got ${there}`);
    }
    const stored = bytes.subarray(element.start, element.start + element.length);
    const swapped = file.syntax === EXPLICIT_BIG && bits === 8 && element.vr === "OW" ? swappedWords(stored) : stored;
    whole = numbers(swapped, count, bits, signed, file.syntax !== EXPLICIT_BIG);
  }
  const allocated = file.elements.has(TAGS.PixelPaddingValue) ? whole.slice() : whole;
  const above = keepStoredBits(whole, file, bits, signed, where);
  return withAir(whole, allocated, above, file, slice, signed, where);
}

function scaled(whole: Int32Array | Float64Array, { slope, intercept }: CtSlice): Float32Array {
  const hu = new Float32Array(whole.length);
  for (let i = 0; i < whole.length; i++) hu[i] = whole[i]! * slope + intercept;
  return hu;
}

/** Hounsfield units, with padding as air. `allocated` are the numbers with all the bits that they stand in, `above` says
 * in which of them anything stood above the stored ones. */
function withAir(stored: Int32Array | Float64Array, allocated: Int32Array | Float64Array, above: Uint8Array | null,
  file: DicomFile, slice: CtSlice, signed: boolean, where: string): HuSlice {
  const hu = scaled(stored, slice);
  const mask = paddingMask(stored, allocated, hu, file, slice, signed, where);
  let padded = 0;
  for (let i = 0; mask && i < hu.length; i++) {
    if (!mask[i]) continue;
    if (hu[i] !== AIR_HU) padded++;
    hu[i] = AIR_HU;
  }
  return { hu, padded, dropped: above?.some((any, i) => any === 1 && !mask?.[i]) ?? false };
}

/** Samples as they were packed; of signed ones the highest bit that both the picture and the slice have is the sign. */
function decompressed(decode: DecodeSamples, file: DicomFile, at: number, { rows, columns }: CtSlice, signed: boolean,
  where: string): Int32Array {
  const found = decode(firstFrame(file, at, where), rows, columns);
  if (!found) throw corrupt(where, "its pixels cannot be decoded");
  const up = 32 - Math.min(found.precision, tagInteger(file, "BitsStored", where, found.precision) || found.precision);
  return signed ? found.values.map((v) => (v << up) >> up) : found.values;
}

function numbers(bytes: Uint8Array, count: number, bits: number, signed: boolean, little: boolean
): Int32Array | Float64Array {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const out = bits === 32 && !signed ? new Float64Array(count) : new Int32Array(count);
  for (let i = 0; i < count; i++) {
    if (bits === 8) out[i] = signed ? view.getInt8(i) : view.getUint8(i);
    else if (bits === 16) out[i] = signed ? view.getInt16(2 * i, little) : view.getUint16(2 * i, little);
    else out[i] = signed ? view.getInt32(4 * i, little) : view.getUint32(4 * i, little);
  }
  return out;
}

function swappedWords(bytes: Uint8Array): Uint8Array {
  const out = new Uint8Array(bytes.length + (bytes.length & 1));
  for (let i = 0; i < bytes.length; i++) out[i ^ 1] = bytes[i]!;
  return out;
}

/** Keeps the BitsStored bits below HighBit, sign-extended; 1 where anything stood above them. *Source*: DICOM PS3.5 section 8.1.1. */
function keepStoredBits(whole: Int32Array | Float64Array, file: DicomFile, allocated: number, signed: boolean,
  where: string): Uint8Array | null {
  const bits = tagInteger(file, "BitsStored", where, allocated) || allocated;
  const high = tagInteger(file, "HighBit", where, bits - 1);
  if (!(bits >= 1 && bits <= allocated && high >= bits - 1 && high < allocated)) {
    throw corrupt(where, "its pixels cannot be decoded");
  }
  if (bits === allocated) return null;
  const dropped = new Uint8Array(whole.length);
  for (let i = 0; i < whole.length; i++) {
    const value = whole[i]! | 0;
    const up = value << (31 - high);
    const stored = signed ? up >> (32 - bits) : up >>> (32 - bits);
    // `value` is sign-extended where it is signed; unsigned ones of 32 bits are not.
    const above = high === 31 ? 0 : signed ? value >> (high + 1) : value >>> (high + 1);
    if (above !== 0 && (above !== -1 || stored >= 0)) dropped[i] = 1;
    whole[i] = stored;
  }
  return dropped;
}

/** RLE segments, one a byte of the numbers, most significant first, as little-endian numbers. *Source*: PS3.5 annex G. */
function unpacked(file: DicomFile, at: number, count: number, size: number, where: string): Uint8Array {
  const frame = firstFrame(file, at, where);
  const view = new DataView(frame.buffer, frame.byteOffset, frame.byteLength);
  if (frame.length < 64 || view.getUint32(0, true) !== size) throw corrupt(where, "its pixels cannot be decoded");
  const out = new Uint8Array(count * size);
  for (let segment = 0; segment < size; segment++) {
    const start = view.getUint32(4 + 4 * segment, true);
    const end = segment + 1 < size ? view.getUint32(8 + 4 * segment, true) : frame.length;
    if (start < 64 || end > frame.length || start > end) throw corrupt(where, "its pixels cannot be decoded");
    if (unpackSegment(frame.subarray(start, end), out, size - 1 - segment, size) < count) {
      throw corrupt(where, "its pixels cannot be decoded");
    }
  }
  return out;
}

/** PackBits: a count below 128 announces that many bytes and one more, one above it a repeated byte. */
function unpackSegment(packed: Uint8Array, out: Uint8Array, first: number, step: number): number {
  const count = out.length / step;
  let done = 0;
  for (let at = 0; at + 1 < packed.length && done < count;) {
    const head = packed[at++]!;
    if (head === 128) continue;
    const run = head < 128 ? head + 1 : 257 - head;
    for (let i = 0; i < run && done < count; i++, done++) {
      const value = packed[head < 128 ? at + i : at];
      if (value === undefined) return done;
      out[first + step * done] = value;
    }
    at += head < 128 ? run : 1;
  }
  return done;
}

/** The fragments behind the offset table, up to the end marker, which must be there. */
function firstFrame(file: DicomFile, at: number, where: string): Uint8Array {
  const { bytes } = file;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const parts: Uint8Array[] = [];
  for (let number = 0; ; number++) {
    if (at + 8 > bytes.length) throw corrupt(where, "it is cut inside its pixels");
    const tag = view.getUint16(at, true) * 0x10000 + view.getUint16(at + 2, true);
    const length = view.getUint32(at + 4, true);
    if (tag === SEQUENCE_END) break;
    if (tag !== ITEM || at + 8 + length > bytes.length) throw corrupt(where, "its pixels cannot be decoded");
    if (number > 0) parts.push(bytes.subarray(at + 8, at + 8 + length));
    at += 8 + length;
  }
  const frame = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let to = 0;
  for (const part of parts) {
    frame.set(part, to);
    to += part.length;
  }
  return frame;
}
