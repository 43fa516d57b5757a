/** NIfTI files out: labels on the very grid of their scan, with the bytes that `io/nifti/write.py` writes. */
import { fromCanonical, type Affine, type SourceGrid, type Triple } from "./grid.ts";
import { HeaderFields } from "./nifti.ts";
import type { Organ } from "./model.ts";

const COMMENT_ECODE = 6;
const UINT8 = [2, 8] as const;
const INT16 = [4, 16] as const;

/** Labels [z, y, x] as a .nii whose transforms and axis order are the scan's; organ names go in as a comment. */
export function labelsNifti(labels: Uint8Array, source: SourceGrid, raw: Uint8Array | null, organs: Organ[]
): Uint8Array {
  const names = organs.map(({ value, name }) => `${asciiJson(String(value))}: ${asciiJson(name)}`);
  const extension = commentExtension(`{"autosam3d_organs": {${names.join(", ")}}}`);
  const scan = raw && new HeaderFields(raw);
  const length = scan?.length ?? 348;
  const writer = new HeaderWriter(length);
  writer.begin(source.shape, UINT8, length + extension.length);
  if (scan) writer.placeAs(scan);
  else writer.place(source.affine);
  return joined(writer.bytes, extension, fromCanonical(labels, source));
}

/** A [z, y, x] array with its affine as a plain NIfTI-1 file for the viewer: labels, or HU rounded to 16 bits. */
export function viewerNifti(values: Uint8Array | Int16Array, [nz, ny, nx]: Triple, affine: Affine, isLabels: boolean
): Uint8Array {
  const writer = new HeaderWriter(348);
  writer.begin([nx, ny, nz], values instanceof Int16Array ? INT16 : UINT8, 352);
  writer.place(affine);
  // NIFTI_INTENT_LABEL: the viewer then shows 0 as nothing.
  if (isLabels) writer.short(68, 1002);
  return joined(writer.bytes, new Uint8Array(4), new Uint8Array(values.buffer, values.byteOffset, values.byteLength));
}

/** Compressed as .nii.gz. */
export async function gzipped(bytes: Uint8Array): Promise<Blob> {
  const stream = new Blob([bytes as BlobPart]).stream().pipeThrough(new CompressionStream("gzip"));
  return new Response(stream).blob();
}

/** Fields of a new little-endian header. */
class HeaderWriter {
  readonly bytes: Uint8Array;
  private readonly view: DataView;
  private readonly wide: boolean;

  constructor(length: 348 | 540) {
    this.bytes = new Uint8Array(length);
    this.view = new DataView(this.bytes.buffer);
    this.wide = length === 540;
    this.view.setInt32(0, length, true);
    const magic = this.wide ? "n+2\0\r\n\x1a\n" : "n+1";
    for (let i = 0; i < magic.length; i++) this.bytes[(this.wide ? 4 : 344) + i] = magic.charCodeAt(i);
  }

  short(position: number, value: number) {
    this.view.setInt16(position, value, true);
  }

  begin(shape: Triple, [datatype, bits]: readonly [number, number], offset: number) {
    const dims = [3, ...shape, 1, 1, 1, 1];
    dims.forEach((n, i) => {
      if (this.wide) this.view.setBigInt64(16 + 8 * i, BigInt(n), true);
      else this.short(40 + 2 * i, n);
      this.real(this.wide ? 104 : 76, i, 1);
    });
    this.short(this.wide ? 12 : 70, datatype);
    this.short(this.wide ? 14 : 72, bits);
    if (this.wide) this.view.setBigInt64(168, BigInt(offset), true);
    else this.view.setFloat32(108, offset, true);
    this.real(this.wide ? 176 : 112, 0, 1);
  }

  /** The transforms of a scan, without any that has NaN: it must not be handed on. */
  placeAs(scan: HeaderFields) {
    const at = scan.at;
    const reals = (start: number, count: number) => Array.from({ length: count }, (_, i) => scan.real(start, i));
    const [srow, pixdim] = [reals(at.srow, 12), reals(at.pixdim, 4)];
    const quaternion = [...reals(at.quatern, 3), ...reals(at.qoffset, 3)];
    const [sSound, qSound] = [srow.every(Number.isFinite), [...quaternion, ...pixdim].every(Number.isFinite)];
    this.code(at.scode, sSound ? scan.code(at.scode) : 0);
    this.code(at.qcode, qSound ? scan.code(at.qcode) : 0);
    if (sSound) srow.forEach((v, i) => this.real(at.srow, i, v));
    if (qSound) {
      quaternion.forEach((v, i) => this.real(at.quatern, i, v));
      pixdim.forEach((v, i) => this.real(at.pixdim, i, v));
    }
    if (this.wide) this.view.setInt32(at.units, scan.units(), true);
    else this.view.setUint8(at.units, scan.units());
  }

  /** An affine as sform, in a NIfTI-1 header. */
  place(affine: Affine) {
    this.view.setUint8(123, 2);
    this.short(254, 1);
    affine.slice(0, 12).forEach((v, i) => this.real(280, i, v));
    [0, 1, 2].forEach((c) => this.real(76, c + 1, Math.hypot(affine[c]!, affine[4 + c]!, affine[8 + c]!)));
  }

  private code(position: number, value: number) {
    if (this.wide) this.view.setInt32(position, value, true);
    else this.short(position, value);
  }

  private real(start: number, index: number, value: number) {
    if (this.wide) this.view.setFloat64(start + 8 * index, value, true);
    else this.view.setFloat32(start + 4 * index, value, true);
  }
}

/** Four flag bytes, then the comment as an extension: size and code, text, zeros to a multiple of 16. */
function commentExtension(text: string): Uint8Array {
  const encoded = new TextEncoder().encode(text);
  const size = Math.ceil((encoded.length + 8) / 16) * 16;
  const bytes = new Uint8Array(4 + size);
  const view = new DataView(bytes.buffer);
  bytes[0] = 1;
  view.setInt32(4, size, true);
  view.setInt32(8, COMMENT_ECODE, true);
  bytes.set(encoded, 12);
  return bytes;
}

/** A JSON string in ASCII, as Python writes it. */
function asciiJson(text: string): string {
  return JSON.stringify(text).replace(/[\u007f-\uffff]/g, (c) => c === "\x7f" ? c
    : `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

function joined(...parts: Uint8Array[]): Uint8Array {
  const out = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}
