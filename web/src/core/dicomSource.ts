/** What a DICOM object made from a series takes over from it: whose it is, and which images; `io/dicom/source.py`. */
import { sliceShape, sliceStart } from "./acquired.ts";
import { UIDS, type CtSlice } from "./dicomFile.ts";
import { parseDicom } from "./dicomParse.ts";
import { evenToleranceMm } from "./dicomStack.ts";
import { TAGS, tagLetters, tagText, type Keyword } from "./dicomTags.ts";
import { item, type DicomItem } from "./dicomWrite.ts";
import { AppError } from "./errors.ts";
import { type SourceGrid } from "./grid.ts";

/** Patient and General Study modules. *Source*: DICOM PS3.3 tables C.7-1 and C.7-3, types 1 and 2. */
const CARRIED: [Keyword, string][] = [["PatientName", "PN"], ["PatientID", "LO"], ["PatientBirthDate", "DA"],
  ["PatientSex", "CS"], ["StudyDate", "DA"], ["StudyTime", "TM"], ["AccessionNumber", "SH"],
  ["ReferringPhysicianName", "PN"], ["StudyID", "SH"]];
const UID = /^[0-2](\.(0|[1-9]\d*))+$/;
/** What rounding adds to how far a slice may lie from its place on the even grid, in slices. */
const ROUNDING_VOX = 0.01;

export interface SourceSeries {
  /** One a slice along the normal. */
  slices: CtSlice[];
  /** Patient and study; what cannot be carried is empty. */
  identity: DicomItem;
  positionReference: string;
  seriesNumber: number;
  warnings: string[];
}

/** The series for an object on `grid`; SERIES_CHANGED, TAG_MISSING or TAG_INVALID where none can refer to it. */
export function sourceSeries(slices: CtSlice[], firstFile: Uint8Array, grid: SourceGrid, where: string): SourceSeries {
  demandGrid(slices, grid, where);
  for (const slice of slices) for (const keyword of UIDS) checkUid(slice.uids[keyword], keyword, `${where}: file ${slice.number}`);
  if (new Set(slices.map((s) => s.uids.SOPInstanceUID)).size !== slices.length) {
    throw new AppError("TAG_INVALID", where, "several slices have one SOPInstanceUID, so none can be referred to",
      "export the series again");
  }
  if (new Set(slices.map((s) => `${s.uids.StudyInstanceUID} ${s.uids.SeriesInstanceUID}`)).size > 1) {
    throw new AppError("TAG_INVALID", where, "its slices name different studies, so the result belongs to none",
      "export the series again");
  }
  const file = parseDicom(firstFile, where);
  const dropped: string[] = [];
  const identity = item();
  for (const [keyword, vr] of [...CARRIED, ["IssuerOfPatientID", "LO"] as [Keyword, string]]) {
    const text = tagLetters(file, keyword);
    const kept = text !== null && isValid(keyword, text) ? text : "";
    if (kept !== text) dropped.push(keyword);
    if (kept || keyword !== "IssuerOfPatientID") identity.set(TAGS[keyword], [vr, kept]);
  }
  const reference = tagLetters(file, "PositionReferenceIndicator") ?? "";
  const number = tagText(file, "SeriesNumber");
  return { slices, identity, positionReference: isValid("PositionReferenceIndicator", reference) ? reference : "",
    seriesNumber: /^\d{1,9}$/.test(number) ? Number(number) : 1,
    warnings: dropped.length ? [`not carried over, because the series has no valid value: ${dropped.join(", ")}`] : [] };
}

/** Each slice must lie where the grid has it. */
function demandGrid(slices: CtSlice[], grid: SourceGrid, where: string) {
  const [columns, rows, count] = sliceShape(grid);
  const first = slices[0]!;
  if (slices.length !== count || first.rows !== rows || first.columns !== columns) {
    throw new AppError("SERIES_CHANGED", where, `expected ${count} slices of ${rows} x ${columns} pixels, got `
      + `${slices.length} of ${first.rows} x ${first.columns}`, "name the series that was segmented");
  }
  const a = grid.affine;
  const stepMm = Math.hypot(a[2]!, a[6]!, a[10]!);
  // The grid begins at the first slice, which may be as far from the line through all of them as any other.
  const maxOffVox = [0.5, 0.5, (2 * evenToleranceMm(stepMm)) / stepMm + ROUNDING_VOX];
  const axes = [0, 1, 2].map((c) => [a[c]!, a[4 + c]!, a[8 + c]!]);
  const isPlaced = ({ position: [x, y, z] }: CtSlice, k: number) => {
    const start = sliceStart(grid, k);
    const off = [-x, -y, z].map((v, r) => v - a[4 * r + 3]! - dot(a.slice(4 * r, 4 * r + 3), start));
    return axes.every((axis, c) => Math.abs(dot(off, axis) / dot(axis, axis)) <= maxOffVox[c]!);
  };
  if (slices.every(isPlaced)) return;
  throw new AppError("SERIES_CHANGED", where, "its slices lie elsewhere than those that were segmented",
    "name the series that was segmented");
}

function dot(v: number[], w: number[]): number {
  return v.reduce((sum, n, i) => sum + n * w[i]!, 0);
}

function checkUid(text: string, keyword: string, where: string) {
  if (text === "") {
    throw new AppError("TAG_MISSING", where, `expected ${keyword}, to which the result must refer, got none`,
      "export the series again, or take the NIfTI file");
  }
  if (text.length > 64 || !UID.test(text)) {
    throw new AppError("TAG_INVALID", where, `expected a valid ${keyword}`, "export the series again, or take the NIfTI file");
  }
}

/** *Source*: DICOM PS3.5 table 6.2-1. */
function isValid(keyword: Keyword, text: string): boolean {
  if (text === "") return true;
  if (/[\\\p{Zl}\p{Zp}]/u.test(text) || /[^\P{C}\p{Co}\u200c\u200d]/u.test(text)) return false;
  if (keyword.endsWith("Date")) return isDate(text);
  if (keyword.endsWith("Time")) return /^([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?$/.test(text);
  if (keyword === "PatientSex") return ["M", "F", "O"].includes(text);
  if (keyword.endsWith("Name")) return text.split("=").every((group) => group.length <= 64);
  return text.length <= (keyword === "AccessionNumber" || keyword === "StudyID" ? 16 : 64);
}

function isDate(text: string): boolean {
  const [, year, month, day] = /^(\d{4})(\d{2})(\d{2})$/.exec(text)?.map(Number) ?? [];
  if (!year || !month || !day) return false;
  const date = new Date(Date.UTC(year, month - 1, day));
  return date.getUTCMonth() === month - 1 && date.getUTCDate() === day;
}
