/** DICOM elements out: explicit little-endian, every length known. *Source*: DICOM PS3.5 section 7. */

export type Value = string | number[] | Uint8Array | DicomItem[];
/** Tag to its value representation and value. */
export type DicomItem = Map<number, [string, Value]>;

const LONG = new Set(["OB", "OW", "SQ", "UT"]);

/** An item of these elements; text of several values is joined with backslashes. */
export function item(...elements: [number, string, Value][]): DicomItem {
  return new Map(elements.map(([tag, vr, value]) => [tag, [vr, value]]));
}

/** The bytes of a data set, its tags in order. */
export function encoded(dataset: DicomItem): Uint8Array {
  const parts: Uint8Array[] = [];
  for (const [tag, [vr, value]] of [...dataset].sort(([a], [b]) => a - b)) {
    const bytes = valueBytes(vr, value);
    const long = LONG.has(vr);
    const head = new Uint8Array(long ? 12 : 8);
    const view = new DataView(head.buffer);
    view.setUint16(0, tag >>> 16, true);
    view.setUint16(2, tag & 0xffff, true);
    head.set([vr.charCodeAt(0), vr.charCodeAt(1)], 4);
    if (long) view.setUint32(8, bytes.length, true);
    else if (bytes.length > 0xffff) throw new RangeError(`expected a value below 64 KiB in ${tag.toString(16)}`);
    else view.setUint16(6, bytes.length, true);
    parts.push(head, bytes);
  }
  return joined(parts);
}

/** A whole file: empty preamble, file meta information, data set. */
export function dicomFile(meta: DicomItem, dataset: DicomItem): Uint8Array {
  const head = encoded(meta);
  const preamble = new Uint8Array(132);
  preamble.set([68, 73, 67, 77], 128);
  const group = encoded(item([0x00020000, "UL", [head.length]]));
  return joined([preamble, group, head, encoded(dataset)]);
}

/** A decimal string of at most 16 characters, nearest to the value. *Source*: DICOM PS3.5 table 6.2-1, DS. */
export function decimal(value: number): string {
  for (let digits = 17; digits > 0; digits--) {
    const text = String(Number(value.toPrecision(digits)));
    if (text.length <= 16) return text;
  }
  return "0";
}

export function joined(parts: Uint8Array[]): Uint8Array {
  const out = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

function valueBytes(vr: string, value: Value): Uint8Array {
  if (value instanceof Uint8Array) return padded(value, 0);
  if (typeof value === "string") return padded(new TextEncoder().encode(value), vr === "UI" ? 0 : 32);
  if (vr === "SQ") return joined((value as DicomItem[]).flatMap((one) => {
    const bytes = encoded(one);
    const head = new DataView(new ArrayBuffer(8));
    head.setUint16(0, 0xfffe, true);
    head.setUint16(2, 0xe000, true);
    head.setUint32(4, bytes.length, true);
    return [new Uint8Array(head.buffer), bytes];
  }));
  const numbers = value as number[];
  const size = vr === "US" ? 2 : 4;
  const view = new DataView(new ArrayBuffer(size * numbers.length));
  numbers.forEach((n, i) => {
    if (vr === "US") view.setUint16(2 * i, n, true);
    else if (vr === "AT") {
      view.setUint16(4 * i, n >>> 16, true);
      view.setUint16(4 * i + 2, n & 0xffff, true);
    } else view.setUint32(4 * i, n, true);
  });
  return new Uint8Array(view.buffer);
}

function padded(bytes: Uint8Array, fill: number): Uint8Array {
  if (bytes.length % 2 === 0) return bytes;
  const out = new Uint8Array(bytes.length + 1).fill(fill);
  out.set(bytes);
  return out;
}
