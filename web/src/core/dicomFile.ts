/**
 * What one file is: a slice of a CT scan, a CT image that cannot be one, or another object; `io/dicom/header.py`.
 *
 * Messages name a file by its place in the sorted folder, never by what stands in it.
 */
import { readAcquired, type Acquired } from "./dicomAcquisitions.ts";
import { corrupt, DEFLATED, deflatedError, EXPLICIT_BIG, EXPLICIT_LITTLE, IMPLICIT_LITTLE, parseDicom, readMeta,
  type DicomFile } from "./dicomParse.ts";
import { hashed, hasTag, tagInteger, tagLetters, tagNumbers, tagText } from "./dicomTags.ts";
import { AppError } from "./errors.ts";
import type { Triple } from "./grid.ts";

export const RLE = "1.2.840.10008.1.2.5";
/** Any prediction; the first one, which is the usual. */
export const JPEG_LOSSLESS = ["1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"];
export const JPEG_2000_LOSSLESS = "1.2.840.10008.1.2.4.90";
const REMEDY = "copy or export the series again";
const MAX_EDGE = 8192;
/** Cosines are written with few digits: up to this their length may be off 1. */
const MAX_OFF_UNIT = 0.01;
const CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2";
const MULTIFRAME_CT = ["1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"];
const SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7";
const MODALITIES = new Set(["CT", "MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "RF", "OT", "SR", "SEG", "RTSTRUCT",
  "RTPLAN", "RTDOSE", "RTIMAGE", "REG", "PR", "KO", "DOC"]);
/** Compressed forms that the page cannot read, by the beginning of their names. *Source*: DICOM PS3.6 table A-1. */
const COMPRESSED: [string, string][] = [
  ["1.2.840.10008.1.2.4.20", "HTJ2K"], ["1.2.840.10008.1.2.4.8", "JPEG-LS"],
  ["1.2.840.10008.1.2.4.9", "JPEG 2000 that may be lossy"], ["1.2.840.10008.1.2.4.10", "MPEG"],
  ["1.2.840.10008.1.2.4.5", "lossy JPEG"],
];

export const UIDS = ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"
] as const;
export type UidKeyword = (typeof UIDS)[number];

/** The geometry and scaling of one image; hashes stand for identifiers. */
export interface CtSlice {
  /** Place among the sorted files, from 1. */
  number: number;
  series: string;
  /** What a person knows the series by; shown on this device alone. */
  title: string;
  patient: string;
  frameOfReference: string;
  syntax: string;
  isCt: boolean;
  rows: number;
  columns: number;
  position: Triple;
  /** The directions in which columns and rows are counted, in LPS. */
  orientation: [Triple, Triple];
  /** Between rows, between columns. */
  spacingMm: [number, number];
  slope: number;
  intercept: number;
  rescaleType: string;
  photometric: string;
  acquired: Acquired;
  /** Half a unit of the last digit of the cosines; 0 where they are exact or lie along the patient's axes. */
  cosineRounding: number;
  /** As they stand in the file; a result refers to them. */
  uids: Record<UidKeyword, string>;
}

/** A CT image that cannot be read as a slice. It stops the series that it belongs to, and no other. */
export interface UnfitImage {
  error: AppError;
  /** Hash; null where the file does not say, so it may be of any series. */
  series: string | null;
  /** Whether it is a picture or a text that was stored with the series, rather than a slice of it. */
  isPage: boolean;
  /** Rows and columns of an image without a place in the patient; of another size than the slices it is a page. */
  shape: [number, number] | null;
}

export function isSlice(found: CtSlice | UnfitImage): found is CtSlice {
  return "syntax" in found;
}

/**
 * The slice in these bytes; or why it is none; or in one word what else the file is.
 *
 * @param numBytes of the whole file, of which `bytes` may be the beginning.
 * @param inflated of a deflated data set, its beginning.
 */
export function parseSlice(bytes: Uint8Array, numBytes: number, number: number, where: string, inflated?: Uint8Array
): CtSlice | UnfitImage | string {
  let file: DicomFile;
  try {
    file = parseDicom(bytes, where, inflated);
  } catch (error) {
    return unparsed(bytes, where, asAppError(error));
  }
  const known = tagText(file, "SeriesInstanceUID") !== "" || file.hasPixels;
  const series = known ? hashed(tagText(file, "SeriesInstanceUID")) : null;
  try {
    const isDeflated = file.syntax === DEFLATED;
    if (isDeflated && !hasTag(file, "Modality") && !hasTag(file, "SOPClassUID")) {
      return unparsed(bytes, where, deflatedError(where));
    }
    const kind = kindOf(file, where);
    if (kind !== "") return kind;
    if (isDeflated) throw deflatedError(where);
    if (numBytes > bytes.length) throw new AppError("LENGTH", where, "expected at most 512 MiB a slice", REMEDY);
    if (tagInteger(file, "NumberOfFrames", where, 1) > 1) throw multiframeError(where);
    if (!file.hasPixels) throw corrupt(where, "it ends before its pixels");
    return sliceOf(file, number, series!, where);
  } catch (error) {
    return unfit(file, asAppError(error), series);
  }
}

export function multiframeError(where: string): AppError {
  return new AppError("MULTIFRAME", where, "enhanced multi-frame CT is not read",
    "convert it to single-frame CT images, or to NIfTI");
}

function asAppError(error: unknown): AppError {
  if (error instanceof AppError) return error;
  throw error;
}

/** Of a file whose data set is damaged, group 2 may still say that it is no CT image. */
function unparsed(bytes: Uint8Array, where: string, error: AppError): UnfitImage | string {
  let sopClass = "";
  try {
    sopClass = readMeta(bytes, where).sopClass;
  } catch {
    // Then nothing says what it is.
  }
  return ["", CT_IMAGE].includes(sopClass) ? { error, series: null, isPage: false, shape: null } : "other";
}

/** "" of a CT image, or in one word what else it is. */
function kindOf(file: DicomFile, where: string): string {
  const modality = tagText(file, "Modality").toUpperCase();
  const sopClass = tagText(file, "SOPClassUID") || file.mediaClass;
  if (!modality && !sopClass) throw corrupt(where, "it says neither what it is nor how it was made");
  if (MULTIFRAME_CT.includes(sopClass)) return "multi-frame CT";
  const isSecondary = sopClass.startsWith(SECONDARY_CAPTURE);
  const hasPlace = hasTag(file, "Rows") && hasTag(file, "ImagePositionPatient");
  // A vendor's own class may be that of a CT image; raw data and what else a CT scanner makes have no place.
  const isCt = sopClass === CT_IMAGE
    || (modality === "CT" && !isSecondary && (sopClass === "" || (hasPlace && file.hasPixels)));
  if (!isCt) {
    if (isSecondary) return "secondary capture";
    return MODALITIES.has(modality) && modality !== "CT" ? modality : "other";
  }
  return tagText(file, "ImageType").toUpperCase().includes("LOCALIZER") ? "localizer" : "";
}

/** Colours are no CT slice, nor is an image without any place that says that it was made afterwards. */
function unfit(file: DicomFile, error: AppError, series: string | null): UnfitImage {
  const integer = (keyword: "Rows" | "Columns" | "SamplesPerPixel", fallback?: number) => {
    try {
      return tagInteger(file, keyword, "", fallback);
    } catch {
      return null;
    }
  };
  const [rows, columns, samples] = [integer("Rows"), integer("Columns"), integer("SamplesPerPixel", 1)];
  const isWhole = rows !== null && columns !== null && samples !== null;
  const hasPlace = hasTag(file, "ImagePositionPatient") || hasTag(file, "ImageOrientationPatient");
  const saysPage = /SECONDARY|SCREEN/.test(tagText(file, "ImageType").toUpperCase());
  return { error, series, isPage: (isWhole && samples !== 1) || (!hasPlace && saysPage),
    shape: hasPlace || !isWhole ? null : [rows, columns] };
}

function sliceOf(file: DicomFile, number: number, series: string, where: string): CtSlice {
  const [rows, columns] = [tagInteger(file, "Rows", where), tagInteger(file, "Columns", where)];
  checkPixels(file, rows, columns, where);
  const [slope, intercept] = rescale(file, where);
  const { orientation, cosineRounding } = orientationOf(file, where);
  return {
    number, series, title: tagLetters(file, "SeriesDescription") ?? "",
    patient: hashed(tagText(file, "PatientID")), frameOfReference: hashed(tagText(file, "FrameOfReferenceUID")),
    syntax: file.syntax, isCt: true, rows, columns,
    position: tagNumbers(file, "ImagePositionPatient", 3, where) as Triple, orientation,
    spacingMm: spacing(file, where), slope, intercept, rescaleType: tagText(file, "RescaleType").toUpperCase(),
    photometric: tagText(file, "PhotometricInterpretation"), acquired: readAcquired(file), cosineRounding,
    uids: Object.fromEntries(UIDS.map((k) => [k, tagText(file, k)])) as CtSlice["uids"],
  };
}

function checkPixels(file: DicomFile, rows: number, columns: number, where: string) {
  if (tagInteger(file, "SamplesPerPixel", where, 1) !== 1) {
    throw new AppError("DTYPE", where, "expected one number a pixel, got colours", "give the CT series itself");
  }
  const bits = tagInteger(file, "BitsAllocated", where);
  if (![8, 16, 32].includes(bits)) {
    throw new AppError("DTYPE", where, `expected 8, 16 or 32 bits a pixel, got ${bits}`, REMEDY);
  }
  if (![rows, columns].every((n) => n >= 1 && n <= MAX_EDGE)) {
    throw new AppError("LENGTH", where, `expected 1 to ${MAX_EDGE} rows and columns, got ${rows} and ${columns}`,
      REMEDY);
  }
  if ([IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG].includes(file.syntax)) {
    if ((rows * columns * bits) / 8 > file.bytes.length) {
      throw new AppError("LENGTH", where, `${rows} x ${columns} pixels need more bytes than the file's `
        + String(file.bytes.length), "the slice is cut or its header is wrong; export it again");
    }
  } else if (![RLE, ...JPEG_LOSSLESS, JPEG_2000_LOSSLESS].includes(file.syntax)) {
    const name = COMPRESSED.find(([uid]) => file.syntax.startsWith(uid))?.[1];
    throw new AppError("CODEC", where, name ? `its pixels are compressed (${name}), which this page does not read`
      : "its pixels have a form that is not known here", "export the series uncompressed, convert it (gdcmconv --raw, "
      + "dcmdjpeg or dcmdjpls), or use autosam3d segment on a computer");
  }
}

function rescale(file: DicomFile, where: string): [number, number] {
  if (!hasTag(file, "RescaleSlope") || !hasTag(file, "RescaleIntercept")) {
    throw new AppError("NOT_HU", where, "expected RescaleSlope and RescaleIntercept, which turn stored numbers into "
      + "Hounsfield units", "export the series again");
  }
  const slope = tagNumbers(file, "RescaleSlope", 1, where)[0]!;
  const intercept = tagNumbers(file, "RescaleIntercept", 1, where)[0]!;
  if (slope === 0) {
    throw new AppError("TAG_INVALID", where, `expected a plausible rescale, got slope ${slope} and intercept `
      + String(intercept), REMEDY);
  }
  return [slope, intercept];
}

/** Unit vectors, at right angles as far as their digits go. */
function orientationOf(file: DicomFile, where: string): Pick<CtSlice, "orientation" | "cosineRounding"> {
  const cosines = tagNumbers(file, "ImageOrientationPatient", 6, where);
  const [row, column] = [cosines.slice(0, 3) as Triple, cosines.slice(3) as Triple];
  if (Math.abs(dot(row, column)) > 0.99) {
    throw new AppError("AFFINE_SINGULAR", where, "expected rows and columns across each other, got "
      + `ImageOrientationPatient ${cosines.join(", ")}`, REMEDY);
  }
  if ([row, column].some((v) => Math.abs(Math.sqrt(dot(v, v)) - 1) > MAX_OFF_UNIT)) {
    throw new AppError("TAG_INVALID", where, "expected two directions of length 1 in ImageOrientationPatient", REMEDY);
  }
  const [rows, columns] = [unit(row), unit(column)];
  const rounding = roundingOf(cosines);
  const off = dot(rows, columns);
  if (Math.abs(off) > 2 * rounding) return { orientation: [rows, columns], cosineRounding: 0 };
  // Of directions that are written with two decimals the angle between is as uncertain as they are.
  const across = off === 0 ? columns : unit(columns.map((v, i) => v - off * rows[i]!) as Triple);
  return { orientation: [rows, across], cosineRounding: rounding };
}

/** Half a unit of the second or third decimal, where no cosine has more; 0 along the patient's axes. */
function roundingOf(cosines: number[]): number {
  if (cosines.every((v) => v === 0 || Math.abs(v) === 1)) return 0;
  const found = [100, 1000].find((unit) => cosines.every((v) => Math.round(v * unit) / unit === v));
  return found === undefined ? 0 : 0.5 / found;
}

/** In this order, which Python's code has, too. */
function dot(a: Triple, b: Triple): number {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}

function unit(v: Triple): Triple {
  const length = Math.sqrt(dot(v, v));
  return v.map((x) => x / length) as Triple;
}

function spacing(file: DicomFile, where: string): [number, number] {
  const [rows, columns] = tagNumbers(file, "PixelSpacing", 2, where) as [number, number];
  if (rows <= 0 || columns <= 0) {
    throw new AppError("TAG_INVALID", where, `expected a positive PixelSpacing, got ${rows} and ${columns}`, REMEDY);
  }
  return [rows, columns];
}
