/** One DICOM file's elements, read with distrust: lengths, depth and number are bounded, nothing is allocated by them. */
import { AppError } from "./errors.ts";

export const IMPLICIT_LITTLE = "1.2.840.10008.1.2";
export const EXPLICIT_LITTLE = "1.2.840.10008.1.2.1";
export const EXPLICIT_BIG = "1.2.840.10008.1.2.2";
export const DEFLATED = "1.2.840.10008.1.2.1.99";
export const PIXEL_DATA = 0x7fe00010;

const REMEDY = "copy or export the series again";
const MAX_DEPTH = 64;
const MAX_ELEMENTS = 200_000;
/** Values that are longer are no tag of ours. */
const MAX_VALUE_BYTES = 1 << 16;
const MAX_INFLATED_BYTES = 1 << 20;
const UNDEFINED = 0xffffffff;
const [ITEM, ITEM_END, SEQUENCE_END] = [0xfffee000, 0xfffee00d, 0xfffee0dd];
/** Value representations with a length of 32 bits. *Source*: DICOM PS3.5 section 7.1.2. */
const LONG = new Set(["OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"]);

export interface Element {
  /** "" where the file does not say it. */
  vr: string;
  /** Where its value lies in the file. */
  start: number;
  length: number;
}

export interface DicomFile {
  bytes: Uint8Array;
  /** Of the main level, up to the pixels; the tag is (group << 16) + element. */
  elements: Map<number, Element>;
  little: boolean;
  /** Transfer syntax. */
  syntax: string;
  /** Of the file meta information: the class of what follows. */
  mediaClass: string;
  /** Whether parsing came as far as the pixels. */
  hasPixels: boolean;
}

/** Of one file: what follows group 2, and from which byte on. */
export interface FileMeta {
  /** Transfer syntax; "" where none is named. */
  syntax: string;
  /** Media Storage SOP Class UID; "" where none is named. */
  sopClass: string;
  begin: number;
}

/** Whether these bytes begin as DICOM: with a preamble, or as old files do with group 2 or 8 at once. */
export function isDicom(start: Uint8Array): boolean {
  if (start.length < 132) return false;
  if (ascii(start, 128, 4) === "DICM") return true;
  if (start[1] !== 0 || start[3] !== 0) return false;
  return start[0] === 8 || (start[0] === 2 && /^[A-Z]{2}$/.test(ascii(start, 4, 2)));
}

/** Group 2, which is explicit and little-endian in every file. *Source*: DICOM PS3.10 section 7.1. */
export function readMeta(bytes: Uint8Array, where: string): FileMeta {
  const meta = new Reader(bytes, true, true, where);
  const begin = meta.readGroup(ascii(bytes, 128, 4) === "DICM" ? 132 : 0, 2);
  const text = (tag: number) => {
    const found = meta.elements.get(tag);
    return found ? ascii(bytes, found.start, found.length).replace(/[\0 ]+$/, "").trim() : "";
  };
  return { syntax: text(0x00020010), sopClass: text(0x00020002), begin };
}

/**
 * The elements of a whole file, or of the beginning of one.
 *
 * Where the bytes end within an element, parsing ends there, and `hasPixels` tells.
 *
 * @param inflated of a deflated data set, its beginning; such files have no pixels here.
 */
export function parseDicom(bytes: Uint8Array, where: string, inflated?: Uint8Array): DicomFile {
  const { syntax: named, sopClass, begin } = readMeta(bytes, where);
  const [body, at] = inflated ? [inflated, 0] : [bytes, begin];
  if (named === DEFLATED && !inflated) throw deflatedError(where);
  // Where no syntax is named, two capital letters behind the first tag are a value representation.
  const explicit = named ? named !== IMPLICIT_LITTLE : /^[A-Z]{2}$/.test(ascii(body, at + 4, 2));
  const reader = new Reader(body, named !== EXPLICIT_BIG, explicit, where);
  const hasPixels = reader.readToPixels(at);
  return { bytes: body, elements: reader.elements, little: reader.little, syntax: named || IMPLICIT_LITTLE,
    mediaClass: sopClass, hasPixels };
}

/** A deflated data set is not inflated: a small file may claim any size. */
export function deflatedError(where: string): AppError {
  return new AppError("CODEC", where, `deflated DICOM (${DEFLATED}) is not read`,
    "convert it to an uncompressed transfer syntax");
}

/** Of a deflated data set its first megabyte, to learn which series it is of. */
export async function inflatedStart(packed: Uint8Array): Promise<Uint8Array> {
  const out = new Uint8Array(MAX_INFLATED_BYTES);
  const stream = new Blob([packed.slice(0, MAX_INFLATED_BYTES)]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const reader = stream.getReader() as ReadableStreamDefaultReader<Uint8Array>;
  let filled = 0;
  try {
    for (let chunk = await reader.read(); !chunk.done && filled < out.length; chunk = await reader.read()) {
      const kept = chunk.value.subarray(0, out.length - filled);
      out.set(kept, filled);
      filled += kept.length;
    }
  } catch {
    // What is cut or damaged says as much as it has.
  } finally {
    void reader.cancel().catch(() => undefined);
  }
  return out.subarray(0, filled);
}

export function ascii(bytes: Uint8Array, start: number, length: number): string {
  return String.fromCharCode(...bytes.subarray(start, Math.min(start + length, start + MAX_VALUE_BYTES)));
}

export function corrupt(where: string, fault: string): AppError {
  return new AppError("SLICE_CORRUPT", where, fault, REMEDY);
}

class Reader {
  readonly elements = new Map<number, Element>();
  private readonly view: DataView;
  private count = 0;

  constructor(private readonly bytes: Uint8Array, readonly little: boolean, private readonly explicit: boolean,
    private readonly where: string) {
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  /** The elements of one group; where the next one begins. */
  readGroup(at: number, group: number): number {
    while (at + 8 <= this.bytes.length && this.view.getUint16(at, this.little) === group) {
      const { tag, element } = this.header(at);
      if (element.length === UNDEFINED || element.start + element.length > this.bytes.length) {
        throw corrupt(this.where, "it is cut or damaged");
      }
      this.elements.set(tag, element);
      at = element.start + element.length;
    }
    return at;
  }

  /** The main level; false where the file ends before its pixels. */
  readToPixels(at: number): boolean {
    while (at + 8 <= this.bytes.length) {
      const { tag, element } = this.header(at);
      if (tag === PIXEL_DATA) {
        this.elements.set(tag, element);
        return true;
      }
      if (tag > PIXEL_DATA || tag === ITEM || tag === ITEM_END || tag === SEQUENCE_END) return false;
      const end = this.end(element, 0);
      if (end > this.bytes.length) return false;
      this.elements.set(tag, element);
      at = end;
    }
    return false;
  }

  private header(at: number): { tag: number; element: Element } {
    if (++this.count > MAX_ELEMENTS) throw corrupt(this.where, `it has more than ${MAX_ELEMENTS} elements`);
    const tag = this.view.getUint16(at, this.little) * 0x10000 + this.view.getUint16(at + 2, this.little);
    // Items and their ends have no value representation in either form.
    if (!this.explicit || tag >= ITEM) {
      return { tag, element: { vr: "", start: at + 8, length: this.view.getUint32(at + 4, this.little) } };
    }
    const vr = ascii(this.bytes, at + 4, 2);
    if (!LONG.has(vr)) {
      return { tag, element: { vr, start: at + 8, length: this.view.getUint16(at + 6, this.little) } };
    }
    if (at + 12 > this.bytes.length) return { tag, element: { vr, start: at + 12, length: 0 } };
    return { tag, element: { vr, start: at + 12, length: this.view.getUint32(at + 8, this.little) } };
  }

  /** Where an element ends; beyond the file where it is cut. */
  private end(element: Element, depth: number): number {
    if (element.length !== UNDEFINED) return element.start + element.length;
    if (depth >= MAX_DEPTH) {
      throw new AppError("NESTING", this.where, "its sequences are nested too deeply", REMEDY);
    }
    // A sequence of unknown length: items until its end.
    for (let at = element.start; at + 8 <= this.bytes.length;) {
      const { tag, element: item } = this.header(at);
      if (tag === SEQUENCE_END) return item.start;
      if (tag !== ITEM) return this.bytes.length + 1;
      at = item.length === UNDEFINED ? this.endOfItem(item.start, depth + 1) : item.start + item.length;
    }
    return this.bytes.length + 1;
  }

  private endOfItem(at: number, depth: number): number {
    while (at + 8 <= this.bytes.length) {
      const { tag, element } = this.header(at);
      if (tag === ITEM_END) return element.start;
      at = this.end(element, depth);
    }
    return this.bytes.length + 1;
  }
}
