/** Which pixels of a slice are padding around what was measured; `io/dicom/pixels.py`. */
import type { CtSlice } from "./dicomFile.ts";
import { ascii, type DicomFile } from "./dicomParse.ts";
import { TAGS, tagInteger, type Keyword } from "./dicomTags.ts";

/** Numbers in this range may have been measured, so they are padding only where they reach the picture's edge; the
 * extended CT scale of metal-artefact series ends at the upper one. */
const MEASURED_HU = [-900, 30710] as const;
type Numbers = Int32Array | Float64Array;

/** 1 where a pixel is padding: of one value or between two ends, before any rescale; null where there is none.
 *
 * *Source*: DICOM PS3.3 C.7.5.1.1.2: signed or unsigned as PixelRepresentation says, whatever the tag's own form is. A
 * value that does not fit into BitsStored, as some scanners have it, stands in all the bits that are allocated. */
export function paddingMask(stored: Numbers, whole: Numbers, hu: Float32Array, file: DicomFile, slice: CtSlice,
  signed: boolean, where: string): Uint8Array | null {
  const first = rawNumber(file, "PixelPaddingValue");
  if (!first) return null;
  const limit = rawNumber(file, "PixelPaddingRangeLimit");
  const padding = limit ? [first, limit] : [first];
  const allocated = tagInteger(file, "BitsAllocated", where);
  const bits = tagInteger(file, "BitsStored", where, allocated) || allocated;
  let ends = padding.map(([value, size]) => numberOf(value, Math.min(size, Math.max(allocated, 16)), signed));
  const [low, high] = signed ? [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] : [0, 2 ** bits - 1];
  if (signed && padding.every(([value]) => value < 2 ** bits)) {
    ends = padding.map(([value]) => numberOf(value, bits, true));
  }
  const pixels = ends.every((end) => end >= low && end <= high) ? stored : whole;
  const [least, most] = [Math.min(...ends), Math.max(...ends)];
  const mask = new Uint8Array(pixels.length);
  let [any, mayBeMeasured] = [false, false];
  for (let i = 0; i < pixels.length; i++) {
    if (pixels[i]! < least || pixels[i]! > most) continue;
    mask[i] = 1;
    any = true;
    mayBeMeasured ||= hu[i]! > MEASURED_HU[0] && hu[i]! <= MEASURED_HU[1];
  }
  if (!any) return null;
  return mayBeMeasured ? fromTheEdge(mask, slice.rows, slice.columns) : mask;
}

function numberOf(value: number, bits: number, signed: boolean): number {
  const kept = value % 2 ** bits;
  return signed && kept >= 2 ** (bits - 1) ? kept - 2 ** bits : kept;
}

/** The bits of a tag's first number, and how many, whatever the file calls it: US, SS, neither, or text. */
function rawNumber(file: DicomFile, keyword: Keyword): [number, number] | null {
  const element = file.elements.get(TAGS[keyword]);
  if (!element) return null;
  if (["DS", "IS", "LO", "SH"].includes(element.vr)) {
    const text = ascii(file.bytes, element.start, element.length).split("\\")[0]!.replace(/[\0 ]+$/, "").trim();
    return /^[+-]?\d{1,5}$/.test(text) ? [Number(text) & 0xffff, 16] : null;
  }
  const size = element.length >= 4 && ["UL", "SL"].includes(element.vr) ? 4 : 2;
  if (element.length < size) return null;
  const view = new DataView(file.bytes.buffer, file.bytes.byteOffset + element.start, size);
  return size === 4 ? [view.getUint32(0, file.little), 32] : [view.getUint16(0, file.little), 16];
}

/** What of a mask hangs together with the picture's edge. */
function fromTheEdge(mask: Uint8Array, rows: number, columns: number): Uint8Array {
  const out = new Uint8Array(mask.length);
  const waiting: number[] = [];
  const visit = (i: number) => {
    if (!mask[i] || out[i]) return;
    out[i] = 1;
    waiting.push(i);
  };
  for (let x = 0; x < columns; x++) [x, (rows - 1) * columns + x].forEach(visit);
  for (let y = 0; y < rows; y++) [y * columns, (y + 1) * columns - 1].forEach(visit);
  for (let i = waiting.pop(); i !== undefined; i = waiting.pop()) {
    const [x, y] = [i % columns, Math.floor(i / columns)];
    if (x > 0) visit(i - 1);
    if (x < columns - 1) visit(i + 1);
    if (y > 0) visit(i - columns);
    if (y < rows - 1) visit(i + columns);
  }
  return out;
}
