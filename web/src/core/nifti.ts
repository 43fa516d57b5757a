/** NIfTI files in: header and voxels, distrusted as `io/nifti/header.py` and `io/nifti/read.py` distrust them. */
import { AppError, sizeText } from "./errors.ts";
import { canonicalAffine, canonicalShape, checkAffine, checkExtent, columnLengths, cornersApartVox, sourceGrid,
  toCanonical, type Affine, type SourceGrid, type Triple } from "./grid.ts";
import { checkHounsfield } from "./hounsfield.ts";

const MIN_SLICES = 8;
const MAX_OFFSET_BYTES = 1 << 26;
const MAX_SLOPE = 1e6;
const CONFLICT_VOX = 0.1;
/** Data type code to bytes a voxel. */
const REAL_TYPES: Record<number, number> = { 2: 1, 4: 2, 8: 4, 16: 4, 64: 8, 256: 1, 512: 2, 768: 4, 1024: 8, 1280: 8 };
const UNIT_MM: Record<number, [number, string]> = { 1: [1000, "metres"], 2: [1, "millimetres"],
  3: [0.001, "micrometres"] };

export interface NiftiHeader {
  shape: Triple;
  datatype: number;
  littleEndian: boolean;
  dataOffset: number;
  slope: number;
  intercept: number;
  affine: Affine;
  /** The header's own 348 or 540 bytes. */
  raw: Uint8Array;
  warnings: string[];
}

/** One CT: float32 HU [z, y, x] nearest RAS+, and how its file stored it. */
export interface Volume {
  voxels: Float32Array;
  shape: Triple;
  affine: Affine;
  /** (z, y, x). */
  spacingMm: Triple;
  source: SourceGrid;
  /** A NIfTI file's own header; null for other kinds. */
  raw: Uint8Array | null;
  warnings: string[];
}

/** Byte positions of the fields, in NIfTI-1 and NIfTI-2. *Source*: nifti1.h and nifti2.h. */
const LAYOUT = {
  348: { dim: 40, datatype: 70, bitpix: 72, pixdim: 76, offset: 108, slope: 112, inter: 116, units: 123, qcode: 252,
    scode: 254, quatern: 256, qoffset: 268, srow: 280 },
  540: { dim: 16, datatype: 12, bitpix: 14, pixdim: 104, offset: 168, slope: 176, inter: 184, units: 500, qcode: 344,
    scode: 348, quatern: 352, qoffset: 376, srow: 400 },
} as const;

/** The fields of a header by name, whichever version and byte order it has. */
export class HeaderFields {
  readonly length: 348 | 540;
  readonly little: boolean;
  private readonly view: DataView;

  constructor(bytes: Uint8Array) {
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const found = [true, false].flatMap((little) =>
      ([348, 540] as const).filter((n) => this.view.getInt32(0, little) === n).map((n) => ({ n, little })))[0];
    if (!found) throw new RangeError("neither NIfTI-1 nor NIfTI-2");
    [this.length, this.little] = [found.n, found.little];
  }

  get at() {
    return LAYOUT[this.length];
  }

  short(position: number): number {
    return this.view.getInt16(position, this.little);
  }

  /** A code, 16-bit in NIfTI-1 and 32-bit in NIfTI-2. */
  code(position: number): number {
    return this.length === 348 ? this.short(position) : this.view.getInt32(position, this.little);
  }

  real(start: number, index = 0): number {
    return this.length === 348 ? this.view.getFloat32(start + 4 * index, this.little)
      : this.view.getFloat64(start + 8 * index, this.little);
  }

  dim(index: number): number {
    return this.length === 348 ? this.short(this.at.dim + 2 * index)
      : Number(this.view.getBigInt64(this.at.dim + 8 * index, this.little));
  }

  dataOffset(): number {
    return this.length === 348 ? this.real(this.at.offset) : Number(this.view.getBigInt64(this.at.offset, this.little));
  }

  units(): number {
    return this.length === 348 ? this.view.getUint8(this.at.units) : this.view.getInt32(this.at.units, this.little);
  }
}

/**
 * Checks every field that the voxels or their place depend on.
 *
 * @param start at least the first 540 bytes of the inflated file, or all of a shorter one.
 */
export function parseHeader(start: Uint8Array, where: string): NiftiHeader {
  const fields = checkedKind(start, where);
  const warnings: string[] = [];
  const shape = readShape(fields, where, warnings);
  const datatype = fields.short(fields.at.datatype);
  const bytes = REAL_TYPES[datatype];
  if (bytes === undefined) {
    throw new AppError("DTYPE", where, `expected one real number a voxel, got data type ${datatype}`,
      "export the scan as 16-bit integers");
  }
  if (fields.short(fields.at.bitpix) !== 8 * bytes) {
    throw new AppError("DTYPE", where, `data type ${datatype} has ${8 * bytes} bits, bitpix says `
      + String(fields.short(fields.at.bitpix)), "the header is damaged; export the scan again");
  }
  const dataOffset = fields.dataOffset();
  if (!Number.isInteger(dataOffset) || dataOffset < fields.length + 4 || dataOffset > MAX_OFFSET_BYTES) {
    throw new AppError("OFFSET", where, "expected the voxels to start behind the header, got vox_offset = "
      + String(dataOffset), "the header is damaged; export the scan again");
  }
  const [slope, intercept] = readScaling(fields, where, warnings);
  const affine = readAffine(fields, shape, where, warnings);
  return { shape, datatype, littleEndian: fields.little, dataOffset, slope, intercept, affine,
    raw: start.slice(0, fields.length), warnings };
}

/** Bytes of the file up to its last voxel. */
export function claimedBytes(header: NiftiHeader): number {
  return header.dataOffset + header.shape.reduce((a, b) => a * b, 1) * REAL_TYPES[header.datatype]!;
}

/** The CT in an inflated file. `file` is not kept. */
export function readNifti(file: Uint8Array, where: string): Volume {
  const header = parseHeader(file, where);
  const { shape: fileShape, affine, warnings } = header;
  checkExtent(affine, fileShape, where);
  const claimed = claimedBytes(header);
  if (file.length < claimed) {
    throw new AppError("SIZE", where, `the header claims ${sizeText(claimed)}, the file has ${sizeText(file.length)}`,
      "the file is cut or its header is wrong; copy it again");
  }
  if (Math.min(...fileShape) < MIN_SLICES) {
    throw new AppError("FEW_SLICES", where, `expected at least ${MIN_SLICES} voxels along each axis, got `
      + fileShape.join(" x "), "give the whole scan");
  }
  const source = sourceGrid(fileShape, affine);
  const shape = canonicalShape(source);
  const voxels = new Float32Array(shape[0] * shape[1] * shape[2]);
  const stored = storedNumbers(file, header, voxels.length);
  const { slope, intercept } = header;
  // Scaled in float64 and rounded once, as in Python.
  toCanonical(stored, source, voxels, slope === 1 && intercept === 0 ? (v) => v : (v) => v * slope + intercept);
  checkHounsfield(voxels, shape, where, warnings);
  const canonical = canonicalAffine(source);
  const [x, y, z] = columnLengths(canonical);
  return { voxels, shape, affine: canonical, spacingMm: [z, y, x], source, raw: header.raw, warnings };
}

type Numbers = { [index: number]: number; readonly length: number };

/** The voxels as the file stores them, as numbers; a copy only where alignment or byte order ask for one. */
function storedNumbers(file: Uint8Array, header: NiftiHeader, count: number): Numbers {
  const size = REAL_TYPES[header.datatype]!;
  let bytes = file.subarray(header.dataOffset, header.dataOffset + count * size);
  if ((size > 1 && !header.littleEndian) || bytes.byteOffset % size) bytes = bytes.slice();
  if (size > 1 && !header.littleEndian) swapBytes(bytes, size);
  const at = [bytes.buffer, bytes.byteOffset, count] as const;
  switch (header.datatype) {
    case 2: return new Uint8Array(...at);
    case 4: return new Int16Array(...at);
    case 8: return new Int32Array(...at);
    case 16: return new Float32Array(...at);
    case 64: return new Float64Array(...at);
    case 256: return new Int8Array(...at);
    case 512: return new Uint16Array(...at);
    case 768: return new Uint32Array(...at);
    case 1024: return Float64Array.from(new BigInt64Array(...at), Number);
    default: return Float64Array.from(new BigUint64Array(...at), Number);
  }
}

function swapBytes(bytes: Uint8Array, size: number) {
  for (let start = 0; start < bytes.length; start += size) bytes.subarray(start, start + size).reverse();
}

function checkedKind(start: Uint8Array, where: string): HeaderFields {
  if (start.length === 0) throw new AppError("EMPTY", where, "the file is empty", "copy or export it again");
  let fields: HeaderFields;
  try {
    fields = new HeaderFields(start);
  } catch {
    const dicom = String.fromCharCode(...start.slice(128, 132)) === "DICM";
    throw new AppError("NOT_NIFTI", where, `expected a NIfTI file, got ${dicom ? "a DICOM file" : "another kind"}`,
      dicom ? "convert the series to one .nii.gz file" : "give a .nii or .nii.gz file");
  }
  if (start.length < fields.length) {
    throw new AppError("TRUNCATED", where, `the file ends inside its header, after ${start.length} bytes`,
      "copy or download it again");
  }
  const magic = String.fromCharCode(...(fields.length === 348 ? start.slice(344, 348) : start.slice(4, 8)));
  if (magic === "ni1\0" || magic === "ni2\0") {
    throw new AppError("PAIR", where, "this is the header of a .hdr/.img pair", "convert the pair to one .nii.gz");
  }
  if (magic !== (fields.length === 348 ? "n+1\0" : "n+2\0")) {
    throw new AppError("MAGIC", where, "expected a NIfTI file, its magic is missing",
      "an ANALYZE file has no orientation: convert it from the original scan");
  }
  return fields;
}

function readShape(fields: HeaderFields, where: string, warnings: string[]): Triple {
  const dim = Array.from({ length: 8 }, (_, i) => fields.dim(i));
  const ndim = dim[0]!;
  const sizes = dim.slice(1, ndim + 1);
  if (ndim < 1 || ndim > 7 || sizes.some((n) => n < 1)) {
    throw new AppError("DIMS", where, `expected 1 to 7 positive dimensions, got dim = ${dim.join(", ")}`,
      "the header is damaged; export the scan again");
  }
  if (ndim < 3 || sizes.slice(3).some((n) => n > 1)) {
    throw new AppError("NDIM", where, `expected one 3D scan, got ${ndim}D (${sizes.join(" x ")})`,
      "give one whole scan; split several volumes into files first");
  }
  if (ndim > 3) warnings.push(`${ndim}D with one volume is taken as 3D`);
  return [sizes[0]!, sizes[1]!, sizes[2]!];
}

function readScaling(fields: HeaderFields, where: string, warnings: string[]): [number, number] {
  const [slope, intercept] = [fields.real(fields.at.slope), fields.real(fields.at.inter)];
  if (slope === 0) {
    if (intercept !== 0) {
      warnings.push(`scl_slope is 0, which means no scaling: scl_inter ${intercept} is not applied`);
    }
    return [1, 0];
  }
  if (!(Math.max(Math.abs(slope), Math.abs(intercept)) <= MAX_SLOPE)) {
    throw new AppError("SCALE", where, `expected a finite scaling, got scl_slope ${slope} and scl_inter ${intercept}`,
      "export the scan again");
  }
  return [slope, intercept];
}

/** The transform to believe, in millimetres and with axes at right angles: the sform where both say the same. */
function readAffine(fields: HeaderFields, shape: Triple, where: string, warnings: string[]): Affine {
  const [unitMm, unit] = UNIT_MM[fields.units() & 7] ?? [1, "unknown"];
  if (unit !== "millimetres") {
    warnings.push(`the spatial unit is ${unit}, ${unit === "unknown" ? "mm is taken" : "converted to mm"}`);
  }
  const inMm = (affine: Affine) => affine.map((v, i) => (i < 12 ? v * unitMm : v));
  const hasS = fields.code(fields.at.scode) > 0;
  const hasQ = fields.code(fields.at.qcode) > 0;
  const spacing = [1, 2, 3].map((i) => fields.real(fields.at.pixdim, i));
  if (!hasS && !spacing.every((mm) => Number.isFinite(mm) && mm > 0)) {
    throw new AppError("SPACING", where, `expected positive spacings, got pixdim = ${spacing.join(", ")}`,
      "set the spacing, or better an sform, in the header");
  }
  if (!hasS && !hasQ) {
    throw new AppError("NO_ORIENTATION", where, "sform_code and qform_code are both 0: left and right are unknown",
      "convert it from the original scan");
  }
  if (!hasS) return checkAffine(inMm(qform(fields, where)), where, "qform", warnings);
  const affine = checkAffine(inMm(sform(fields)), where, "sform", warnings);
  if (hasQ) checkAgreement(affine, checkAffine(inMm(qform(fields, where)), where, "qform", []), shape, where, warnings);
  const edges = columnLengths(affine);
  if (edges.some((mm, i) => Math.abs(mm / unitMm - Math.abs(spacing[i]!)) > 1e-8 + 0.01 * Math.abs(spacing[i]!))) {
    warnings.push("pixdim and the sform name different spacings; the sform is taken");
  }
  return affine;
}

function sform(fields: HeaderFields): Affine {
  return [...Array.from({ length: 12 }, (_, i) => fields.real(fields.at.srow, i)), 0, 0, 0, 1];
}

function qform(fields: HeaderFields, where: string): Affine {
  const [b, c, d] = [0, 1, 2].map((i) => fields.real(fields.at.quatern, i)) as Triple;
  const offset = [0, 1, 2].map((i) => fields.real(fields.at.qoffset, i));
  const spacing = [1, 2, 3].map((i) => fields.real(fields.at.pixdim, i));
  const rest = 1 - (b * b + c * c + d * d);
  if (![b, c, d, ...offset, ...spacing].every(Number.isFinite)) return Array<number>(16).fill(NaN);
  if (rest < -1e-3 || spacing.some((mm) => mm <= 0)) {
    throw new AppError("HEADER", where, "the qform is no rotation (quaternion longer than 1, or a spacing of 0)",
      "repair the header");
  }
  const qfac = fields.real(fields.at.pixdim) === -1 ? -1 : 1;
  const a = rest >= 1e-7 ? Math.sqrt(rest) : 0;
  const n = 2 / (a * a + b * b + c * c + d * d);
  const rotation = [
    [1 - n * (c * c + d * d), n * (b * c - a * d), n * (b * d + a * c)],
    [n * (b * c + a * d), 1 - n * (b * b + d * d), n * (c * d - a * b)],
    [n * (b * d - a * c), n * (c * d + a * b), 1 - n * (b * b + c * c)],
  ];
  const rows = rotation.flatMap((row, i) =>
    [row[0]! * spacing[0]!, row[1]! * spacing[1]!, row[2]! * spacing[2]! * qfac, offset[i]!]);
  return [...rows, 0, 0, 0, 1];
}

/** Both transforms are declared: they must say the same, but for a shift of the origin. */
function checkAgreement(s: Affine, q: Affine, shape: Triple, where: string, warnings: string[]) {
  if (cornersApartVox(s, q, shape) <= CONFLICT_VOX) return;
  const shifted = q.map((v, i) => (i % 4 === 3 && i < 12 ? s[i]! : v));
  const apart = cornersApartVox(s, shifted, shape);
  if (apart > CONFLICT_VOX) {
    throw new AppError("AFFINE_CONFLICT", where, `sform and qform place the corners ${apart.toFixed(1)} voxels apart`,
      "find out which one is right and remove the other");
  }
  const shift = Math.hypot(...[3, 7, 11].map((i) => s[i]! - q[i]!));
  warnings.push(`sform and qform differ by a shift of ${shift.toFixed(2)} mm; the sform is taken`);
}
