/**
 * One CT image of a DICOM series: the header that its place and its numbers depend on; `io/dicom/files.py` once more.
 *
 * Messages name a file by its place in the sorted folder, never by what stands in it.
 */
import { corrupt, EXPLICIT_BIG, EXPLICIT_LITTLE, IMPLICIT_LITTLE, parseDicom, type DicomFile } from "./dicomParse.ts";
import { hashed, hasTag, tagInteger, tagLetters, tagNumbers, tagText } from "./dicomTags.ts";
import { AppError } from "./errors.ts";
import type { Triple } from "./grid.ts";

export const RLE = "1.2.840.10008.1.2.5";
/** Any prediction; the first one, which is the usual. */
export const JPEG_LOSSLESS = ["1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"];
export const JPEG_2000_LOSSLESS = "1.2.840.10008.1.2.4.90";
const REMEDY = "copy or export the series again";
const MAX_EDGE = 8192;
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
  /** As they stand in the file; a result refers to them. */
  uids: Record<UidKeyword, string>;
}

/** The slice in these bytes, or in one word what else the file is. */
export function parseSlice(bytes: Uint8Array, number: number, where: string): CtSlice | string {
  const file = parseDicom(bytes, where);
  const modality = tagText(file, "Modality").toUpperCase();
  const sopClass = tagText(file, "SOPClassUID") || file.mediaClass;
  if (!modality && !sopClass) throw corrupt(where, "it says neither what it is nor how it was made");
  const isCt = sopClass === CT_IMAGE || (modality === "CT" && !sopClass.startsWith(SECONDARY_CAPTURE));
  if (MULTIFRAME_CT.includes(sopClass) || (isCt && tagInteger(file, "NumberOfFrames", where, 1) > 1)) {
    throw new AppError("MULTIFRAME", where, "enhanced multi-frame CT is not read",
      "convert it to single-frame CT images, or to NIfTI");
  }
  if (!isCt) {
    if (sopClass.startsWith(SECONDARY_CAPTURE)) return "secondary capture";
    return MODALITIES.has(modality) ? modality : "other";
  }
  if (tagText(file, "ImageType").toUpperCase().includes("LOCALIZER")) return "localizer";
  if (!file.hasPixels) throw corrupt(where, "it ends before its pixels");
  const [rows, columns] = [tagInteger(file, "Rows", where), tagInteger(file, "Columns", where)];
  checkPixels(file, rows, columns, where);
  const [slope, intercept] = rescale(file, where);
  const cosines = tagNumbers(file, "ImageOrientationPatient", 6, where);
  const orientation: [Triple, Triple] = [cosines.slice(0, 3) as Triple, cosines.slice(3) as Triple];
  checkDirections(orientation, where);
  return {
    number, series: hashed(tagText(file, "SeriesInstanceUID")), title: tagLetters(file, "SeriesDescription") ?? "",
    patient: hashed(tagText(file, "PatientID")), frameOfReference: hashed(tagText(file, "FrameOfReferenceUID")),
    syntax: file.syntax, isCt, rows, columns,
    position: tagNumbers(file, "ImagePositionPatient", 3, where) as Triple, orientation,
    spacingMm: spacing(file, where), slope, intercept, rescaleType: tagText(file, "RescaleType").toUpperCase(),
    photometric: tagText(file, "PhotometricInterpretation"),
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

function checkDirections([row, column]: [Triple, Triple], where: string) {
  const dot = row[0] * column[0] + row[1] * column[1] + row[2] * column[2];
  if (Math.abs(dot) > 0.99) {
    throw new AppError("AFFINE_SINGULAR", where, "expected rows and columns across each other, got "
      + `ImageOrientationPatient ${[...row, ...column].join(", ")}`, REMEDY);
  }
  if ([row, column].some((v) => Math.abs(Math.hypot(...v) - 1) > 0.01)) {
    throw new AppError("TAG_INVALID", where, "expected two directions of length 1 in ImageOrientationPatient", REMEDY);
  }
}

function spacing(file: DicomFile, where: string): [number, number] {
  const [rows, columns] = tagNumbers(file, "PixelSpacing", 2, where) as [number, number];
  if (rows <= 0 || columns <= 0) {
    throw new AppError("TAG_INVALID", where, `expected a positive PixelSpacing, got ${rows} and ${columns}`, REMEDY);
  }
  return [rows, columns];
}
