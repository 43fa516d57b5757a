/** Values of DICOM tags, read with distrust: a number is finite and there, or the slice is refused. */
import { ascii, type DicomFile } from "./dicomParse.ts";
import { AppError } from "./errors.ts";
import { sha256Hex } from "./sha256.ts";

/** The tags that are read, by their keywords. *Source*: DICOM PS3.6. */
export const TAGS = {
  SpecificCharacterSet: 0x00080005, AcquisitionDate: 0x00080022, AcquisitionDateTime: 0x0008002a,
  AcquisitionTime: 0x00080032, ContrastBolusAgent: 0x00180010, SliceThickness: 0x00180050, KVP: 0x00180060,
  ConvolutionKernel: 0x00181210, AcquisitionNumber: 0x00200012, InstanceNumber: 0x00200013,
  TemporalPositionIdentifier: 0x00200100, TemporalPositionIndex: 0x00209128,
  NominalPercentageOfCardiacPhase: 0x00209241, NominalPercentageOfRespiratoryPhase: 0x00209245,
  PixelPaddingValue: 0x00280120, PixelPaddingRangeLimit: 0x00280121, ImageType: 0x00080008, SOPClassUID: 0x00080016, SOPInstanceUID: 0x00080018,
  StudyDate: 0x00080020, StudyTime: 0x00080030, AccessionNumber: 0x00080050, Modality: 0x00080060,
  ReferringPhysicianName: 0x00080090, SeriesDescription: 0x0008103e, PatientName: 0x00100010, PatientID: 0x00100020,
  IssuerOfPatientID: 0x00100021, PatientBirthDate: 0x00100030, PatientSex: 0x00100040, StudyInstanceUID: 0x0020000d,
  SeriesInstanceUID: 0x0020000e, StudyID: 0x00200010, SeriesNumber: 0x00200011, ImagePositionPatient: 0x00200032,
  ImageOrientationPatient: 0x00200037, FrameOfReferenceUID: 0x00200052, PositionReferenceIndicator: 0x00201040,
  SamplesPerPixel: 0x00280002, PhotometricInterpretation: 0x00280004, NumberOfFrames: 0x00280008, Rows: 0x00280010,
  Columns: 0x00280011, PixelSpacing: 0x00280030, BitsAllocated: 0x00280100, BitsStored: 0x00280101,
  HighBit: 0x00280102, PixelRepresentation: 0x00280103, RescaleIntercept: 0x00281052, RescaleSlope: 0x00281053,
  RescaleType: 0x00281054,
} as const;
export type Keyword = keyof typeof TAGS;

const REMEDY = "export the series again, whole";
const MAX_MAGNITUDE = 1e6;
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;
/** Tags of 16-bit numbers, for files that do not say what a value is. */
const SHORTS = new Set<Keyword>(["SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
  "PixelRepresentation"]);
/** Names of character sets to those of browsers. *Source*: DICOM PS3.3 C.12.1.1.2, WHATWG Encoding. */
const CHARSETS: Record<string, string> = {
  "": "windows-1252", "ISO_IR 6": "windows-1252", "ISO_IR 100": "windows-1252", "ISO_IR 101": "iso-8859-2",
  "ISO_IR 109": "iso-8859-3", "ISO_IR 110": "iso-8859-4", "ISO_IR 144": "iso-8859-5", "ISO_IR 127": "iso-8859-6",
  "ISO_IR 126": "iso-8859-7", "ISO_IR 138": "iso-8859-8", "ISO_IR 148": "windows-1254", "ISO_IR 203": "iso-8859-15",
  "ISO_IR 166": "windows-874", "ISO_IR 13": "shift_jis", "ISO_IR 192": "utf-8", GB18030: "gb18030", GBK: "gbk",
};

export function hasTag(file: DicomFile, keyword: Keyword): boolean {
  return file.elements.has(TAGS[keyword]);
}

/** `count` numbers; TAG_MISSING, or TAG_INVALID for another count, text, NaN, or a magnitude that no geometry has. */
export function tagNumbers(file: DicomFile, keyword: Keyword, count: number, where: string): number[] {
  const element = file.elements.get(TAGS[keyword]);
  const numbers = element && element.length > 0 ? storedNumbers(file, keyword) : null;
  if (!numbers) throw new AppError("TAG_MISSING", where, `expected ${keyword}, got none`, REMEDY);
  if (numbers.length !== count || !numbers.every((n) => Math.abs(n) <= MAX_MAGNITUDE)) {
    throw new AppError("TAG_INVALID", where, `expected ${count} plausible numbers in ${keyword}`, REMEDY);
  }
  return numbers;
}

/** A whole number; fails as `tagNumbers`, where there is no `fallback`. */
export function tagInteger(file: DicomFile, keyword: Keyword, where: string, fallback?: number): number {
  if (fallback !== undefined && (file.elements.get(TAGS[keyword])?.length ?? 0) === 0) return fallback;
  return Math.trunc(tagNumbers(file, keyword, 1, where)[0]!);
}

/** Text of a tag, as bytes of ASCII; "" where there is none. */
export function tagText(file: DicomFile, keyword: Keyword): string {
  const element = file.elements.get(TAGS[keyword]);
  return element ? ascii(file.bytes, element.start, element.length).replace(/[\0 ]+$/, "").trim() : "";
}

/** Text in the file's character set; null where it cannot be told. */
export function tagLetters(file: DicomFile, keyword: Keyword): string | null {
  const element = file.elements.get(TAGS[keyword]);
  if (!element) return "";
  const bytes = file.bytes.subarray(element.start, element.start + element.length);
  const sets = tagText(file, "SpecificCharacterSet").split("\\").map((set) => set.trim());
  // Several sets switch by escape sequences; without one of them the first set holds.
  if (bytes.includes(0x1b)) return null;
  const label = CHARSETS[sets[0]!.replace("ISO 2022 IR", "ISO_IR")];
  if (label === undefined && bytes.some((byte) => byte > 127)) return null;
  try {
    return new TextDecoder(label ?? "windows-1252", { fatal: true }).decode(bytes).replace(/[\0 ]+$/, "").trim();
  } catch {
    return null;
  }
}

/** A short stand-in for a UID or a patient number. */
export function hashed(identifier: string): string {
  return sha256Hex(new TextEncoder().encode(identifier.trim())).slice(0, 8);
}

function storedNumbers(file: DicomFile, keyword: Keyword): number[] | null {
  const { vr, start, length } = file.elements.get(TAGS[keyword])!;
  const view = new DataView(file.bytes.buffer, file.bytes.byteOffset + start, length);
  const every = (size: number, get: (at: number) => number) =>
    Array.from({ length: Math.floor(length / size) }, (_, i) => get(size * i));
  switch (vr || (SHORTS.has(keyword) ? "US" : "DS")) {
    case "US": return every(2, (at) => view.getUint16(at, file.little));
    case "SS": return every(2, (at) => view.getInt16(at, file.little));
    case "UL": return every(4, (at) => view.getUint32(at, file.little));
    case "SL": return every(4, (at) => view.getInt32(at, file.little));
    case "FL": return every(4, (at) => view.getFloat32(at, file.little));
    case "FD": return every(8, (at) => view.getFloat64(at, file.little));
  }
  const text = tagText(file, keyword);
  if (text === "") return null;
  return text.split("\\").map((part) => (NUMBER.test(part.trim()) ? Number(part) : NaN));
}
