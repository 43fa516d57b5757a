/** Which images are the scan: one series of one patient, without what was stored beside its slices; `io/dicom/choice.py`. */
import type { CtSlice, UnfitImage } from "./dicomFile.ts";
import { AppError } from "./errors.ts";

export const MIN_SLICES = 8;
const SAME_DIRECTION = 1e-3;
const MAX_OTHER_ORIENTATION_SHARE = 0.1;
/** Pixel spacings are written with five digits or more; what differs by less is one. */
const SAME_SPACING = 1e-4;
const MAX_LISTED = 8;
/** RescaleTypes that are no Hounsfield units. *Source*: DICOM PS3.3 C.11.1.1.2. */
const OTHER_UNITS = ["ED", "EDW", "MGML", "OD", "PCT", "Z_EFF"];
/** What is left out, as one and as several; other kinds are modalities. */
const KINDS: Record<string, [string, string]> = {
  foreign: ["file that is not DICOM", "files that are not DICOM"], link: ["link", "links"],
  hidden: ["DICOMDIR or hidden file", "DICOMDIR or hidden files"], localizer: ["localizer", "localizers"],
  "secondary capture": ["secondary capture", "secondary captures"],
  "multi-frame CT": ["multi-frame CT image", "multi-frame CT images"],
  page: ["picture or page that is no slice", "pictures or pages that are no slices"],
  other: ["DICOM file of another kind", "DICOM files of other kinds"],
};

/** One of several series, for a person to choose from. */
export interface SeriesChoice {
  key: string;
  title: string;
  slices: number;
  rows: number;
  columns: number;
}

/** Several series: the person has to say which. */
export class ChoiceError extends AppError {
  constructor(where: string, fault: string, readonly choices: SeriesChoice[]) {
    super("SERIES_CHOICE", where, fault, "choose one");
  }
}

/** `2 files that are not DICOM`. */
export function countText(count: number, kind: string): string {
  const [one, several] = KINDS[kind] ?? [`${kind} object`, `${kind} objects`];
  return `${count} ${count === 1 ? one : several}`;
}

/** The slices of the one series that is meant, in the order of their files; `series` is a person's choice. */
export function chosenSlices(slices: CtSlice[], unfit: UnfitImage[], series: string | undefined, where: string,
  warnings: string[]): CtSlice[] {
  const group = chosenSeries(slices, unfit, series, where, warnings);
  leaveUnfit(unfit, group, warnings);
  const stack = withoutStrays(group, where, warnings);
  checkUniform(stack, where, warnings);
  return stack;
}

function chosenSeries(slices: CtSlice[], unfit: UnfitImage[], series: string | undefined, where: string,
  warnings: string[]): CtSlice[] {
  const groups = new Map<string, CtSlice[]>();
  for (const slice of slices) groups.set(slice.series, [...(groups.get(slice.series) ?? []), slice]);
  let group = groups.get(series ?? "");
  if (series !== undefined && !group) {
    throw unfit.find((image) => image.series === series)?.error ?? choice(groups, where, "no such series");
  }
  if (!group && groups.size === 1) group = slices;
  if (!group) {
    if (new Set(slices.map((s) => s.patient)).size > 1) {
      throw new AppError("PATIENTS", where, "expected one patient, found several", "use one folder a patient");
    }
    const stacks = [...groups].filter(([, members]) => members.length >= MIN_SLICES);
    if (!stacks.length && slices.length >= MIN_SLICES) {
      const most = Math.max(...[...groups.values()].map((members) => members.length));
      throw new AppError("SERIES_CHOICE", where, `expected one CT series, found ${groups.size} of `
        + `${most === 1 ? "one slice" : `at most ${most} slices`} each`, "export the series again, with one "
        + "SeriesInstanceUID for all of its slices");
    }
    if (stacks.length !== 1) throw choice(groups, where, "expected one CT series");
    group = stacks[0]![1];
    warnings.push(`series ${stacks[0]![0]} is taken; ${groups.size - 1} shorter ones are left out`);
  }
  if (new Set(group.map((s) => s.patient)).size > 1) {
    throw new AppError("PATIENTS", where, "the slices of one series name different patients", "sort the folder");
  }
  return group;
}

/** The longest first. */
function choice(groups: Map<string, CtSlice[]>, where: string, fault: string): ChoiceError {
  const sorted = [...groups].sort(([a, ofA], [b, ofB]) => ofB.length - ofA.length || (a < b ? -1 : 1));
  const choices = sorted.map(([key, members]) => ({ key, title: members[0]!.title, slices: members.length,
    rows: members[0]!.rows, columns: members[0]!.columns }));
  const listed = choices.slice(0, MAX_LISTED).map((c) => `${c.key}: ${c.slices} slices of ${c.rows} x ${c.columns}`);
  const more = choices.length > MAX_LISTED ? `; and ${choices.length - MAX_LISTED} more` : "";
  return new ChoiceError(where, `${fault}, found ${listed.join("; ")}${more}`, choices);
}

/** An image that cannot be read as a slice counts where the scan may miss it: in its own series. */
function leaveUnfit(unfit: UnfitImage[], slices: CtSlice[], warnings: string[]) {
  let pages = 0;
  const others = new Map<string, number>();
  for (const image of unfit) {
    const isOwn = image.series === null || image.series === slices[0]!.series;
    const { shape } = image;
    const isPage = image.isPage || (shape !== null && !slices.some((s) => s.rows === shape[0] && s.columns === shape[1]));
    if (isOwn && !isPage) throw image.error;
    if (isOwn) pages++;
    else others.set(image.error.code, (others.get(image.error.code) ?? 0) + 1);
  }
  if (pages) warnings.push(`left out: ${countText(pages, "page")}`);
  for (const [code, count] of [...others].sort(([a], [b]) => (a < b ? -1 : 1))) {
    warnings.push(`left out: ${count} ${count === 1 ? "image" : "images"} of other series that cannot be read (${code})`);
  }
}

/** Leaves out the few slices that lie across the stack: scouts that are not marked as such. */
function withoutStrays(slices: CtSlice[], where: string, warnings: string[]): CtSlice[] {
  const directions = slices.map((s) => s.orientation.flat().map((v) => Math.round(v * 100) + 0).join());
  const counts = new Map<string, number>();
  for (const d of directions) counts.set(d, (counts.get(d) ?? 0) + 1);
  const most = Math.max(...counts.values());
  const usual = slices[directions.indexOf([...counts].find(([, n]) => n === most)![0])]!.orientation.flat();
  const stack = slices.filter((s) => s.orientation.flat().every((v, i) => Math.abs(v - usual[i]!) <= SAME_DIRECTION));
  const across = slices.length - stack.length;
  if (across > Math.max(1, MAX_OTHER_ORIENTATION_SHARE * slices.length)) {
    throw new AppError("MIXED_ORIENTATION", where, `${across} of ${slices.length} slices lie otherwise than the rest`,
      "split the series by orientation");
  }
  if (across) warnings.push(`left out: ${across} slices that lie across the stack`);
  return stack;
}

function checkUniform(slices: CtSlice[], where: string, warnings: string[]) {
  const sizes: CtSlice[] = [];
  for (const slice of slices) if (!sizes.some((other) => isOneSize(slice, other))) sizes.push(slice);
  if (sizes.length > 1) {
    const text = sizes.map(({ rows, columns, spacingMm: [a, b] }) =>
      `${rows} x ${columns} pixels of ${Number(a.toPrecision(5))} x ${Number(b.toPrecision(5))} mm`).sort();
    throw new AppError("MIXED_SIZE", where, `expected slices of one size, got ${text.slice(0, MAX_LISTED).join("; ")}`,
      "split the series by size");
  }
  if (new Set(slices.map((s) => s.frameOfReference)).size > 1) {
    throw new AppError("MIXED_FRAME", where, "the slices name different frames of reference, so their positions "
      + "cannot be compared", "split the series");
  }
  if (new Set(slices.map((s) => `${s.slope} ${s.intercept}`)).size > 1) {
    warnings.push("rescale slope or intercept vary from slice to slice; each is applied to its own slice");
  }
  checkUnit(new Set(slices.map((s) => s.rescaleType)), where, warnings);
  if (slices.some((s) => s.photometric === "MONOCHROME1")) {
    warnings.push("MONOCHROME1 turns the display around, not the numbers; the numbers are taken as they are");
  }
}

function isOneSize(a: CtSlice, b: CtSlice): boolean {
  return a.rows === b.rows && a.columns === b.columns
    && a.spacingMm.every((mm, i) => Math.abs(mm - b.spacingMm[i]!) / b.spacingMm[i]! <= SAME_SPACING);
}

/** Maps of iodine, of electron density and the like are CT images whose numbers are no HU. */
function checkUnit(kinds: Set<string>, where: string, warnings: string[]) {
  const other = OTHER_UNITS.filter((unit) => kinds.has(unit));
  if (other.length) {
    throw new AppError("NOT_HU", where, `expected Hounsfield units, got RescaleType ${other.join(", ")}: a map made from `
      + "several energies", "give the series of the CT itself");
  }
  if ([...kinds].some((kind) => !["", "HU"].includes(kind))) warnings.push("RescaleType is not HU");
}
