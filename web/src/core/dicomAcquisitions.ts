/**
 * One acquisition of several that a series may hold; `io/dicom/acquisitions.py` once more.
 *
 * Blocks of slices one above the other are one volume. Groups that lie in one another are several volumes.
 */
import type { DicomFile } from "./dicomParse.ts";
import { tagText, type Keyword } from "./dicomTags.ts";
import { AppError } from "./errors.ts";

/** What tells acquisitions apart. *Source*: DICOM PS3.3 C.7.3.1, C.8.2.1, C.8.15.3.8 and C.7.6.16.2.2. */
const SURE: Keyword[] = ["AcquisitionNumber", "TemporalPositionIdentifier", "TemporalPositionIndex",
  "NominalPercentageOfCardiacPhase", "NominalPercentageOfRespiratoryPhase"];
/** These may differ in a slice or two of one acquisition, so they count only where several slices agree. */
const LIKELY: Keyword[] = ["ContrastBolusAgent", "ConvolutionKernel", "KVP", "SliceThickness"];
const MIN_LIKELY_SLICES = 3;
const MIN_WITHOUT = 8;
const MIN_PAUSE_S = 5;
const MAX_LISTED = 8;
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,2})?$/i;

/** When and how an image was made, as far as it tells acquisitions apart. */
export interface Acquired {
  /** Of the tags, in their order; numbers in one writing, "" where there is none. */
  marks: string[];
  /** Since some day; null where the file does not say. */
  timeS: number | null;
  instanceNumber: number | null;
}

/** A slice's group by one tag; null belongs to any. */
type Label = string | number | null;

export function readAcquired(file: DicomFile): Acquired {
  const instance = tagText(file, "InstanceNumber");
  return { marks: [...SURE, ...LIKELY].map((keyword) => mark(file, keyword)), timeS: timeOf(file),
    instanceNumber: /^[+-]?\d{1,9}$/.test(instance) ? Number(instance) : null };
}

/** Slices must be of one acquisition; `places` counts where they lie from below, and the list tells their heights. */
export function demandOneAcquisition(found: Acquired[], places: number[], heightsMm: number[], where: string) {
  const { groups, woven } = parted(keysOf(found), places);
  if (!woven.length) return;
  const numbered = numberedGroups(groups, found);
  const start = (group: number[]) => startS(group, found);
  const timed = [...numbered.values()].every((group) => group.some((i) => found[i]!.timeS !== null));
  const zero = timed ? Math.min(...[...numbered.values()].map(start)) : null;
  const listed = [...numbered].slice(0, MAX_LISTED).map(([number, group]) => {
    const time = zero === null ? "" : `, ${(start(group) - zero).toFixed(0)} s after the first`;
    const heights = group.map((i) => heightsMm[i]!);
    return `${number}: ${group.length} slices${time}, ${Math.min(...heights).toFixed(1)} to `
      + `${Math.max(...heights).toFixed(1)} mm`;
  }).join("; ");
  const more = numbered.size > MAX_LISTED ? `; and ${numbered.size - MAX_LISTED} more` : "";
  throw new AppError("ACQUISITION_CHOICE", where, `expected one acquisition, found ${numbered.size} that lie in one `
    + `another (by ${woven.join(", ")}): ${listed}${more}`, "give the slices of one of them, or use autosam3d segment "
    + "--acquisition on a computer");
}

function mark(file: DicomFile, keyword: Keyword): string {
  const text = tagText(file, keyword);
  return NUMBER.test(text) ? String(Number(Number(text).toPrecision(9))) : text;
}

/** *Source*: DICOM PS3.5 table 6.2-1, DT and TM; zones are left out, as one scanner has one. */
function timeOf(file: DicomFile): number | null {
  const both = tagText(file, "AcquisitionDateTime");
  const [date, time] = both ? [both.slice(0, 8), both.slice(8)]
    : [tagText(file, "AcquisitionDate"), tagText(file, "AcquisitionTime")];
  const found = /^([01]\d|2[0-3])([0-5]\d)?([0-5]\d(?:\.\d{1,6})?)?/.exec(time);
  if (!found) return null;
  const [hours, minutes, seconds] = [1, 2, 3].map((i) => Number(found[i] ?? 0)) as [number, number, number];
  return dayOf(date) * 86400 + hours * 3600 + minutes * 60 + seconds;
}

function dayOf(text: string): number {
  const [, year, month, day] = /^(\d{4})(\d{2})(\d{2})$/.exec(text)?.map(Number) ?? [];
  return year && month && day ? Date.UTC(year, month - 1, day) / 86400e3 : 0;
}

/** Tag to the label of each slice by it. Tags in which all agree are left out. */
function keysOf(found: Acquired[]): [string, Label[]][] {
  const keys = [...SURE, ...LIKELY].map((name, index): [string, Label[]] => {
    const labels = withoutFew(found.map((a) => a.marks[index]!), (label) => label === "", MIN_WITHOUT);
    return [name, index < SURE.length ? labels : withoutFew(labels, () => true, MIN_LIKELY_SLICES)];
  });
  keys.push(["AcquisitionTime", passes(found.map((a) => a.timeS))]);
  keys.push(["InstanceNumber", ramps(found.map((a) => a.instanceNumber))]);
  return keys.filter(([, labels]) => new Set(labels.filter((label) => label !== null)).size > 1);
}

function withoutFew(labels: Label[], counts: (label: Label) => boolean, atLeast: number): Label[] {
  const numbers = new Map<Label, number>();
  for (const label of labels) numbers.set(label, (numbers.get(label) ?? 0) + 1);
  return labels.map((label) => (counts(label) && numbers.get(label)! < atLeast ? null : label));
}

/** Which pass of the scanner each slice is of: the times fall into groups with pauses between. */
function passes(timesS: (number | null)[]): Label[] {
  const told = [...new Set(timesS.filter((time) => time !== null))].sort((a, b) => a - b);
  const starts = told.filter((time, i) => i === 0 || time - told[i - 1]! > MIN_PAUSE_S);
  const labels: Label[] = timesS.map((time) => (time === null ? -1 : starts.filter((start) => start <= time).length));
  return withoutFew(withoutFew(labels, (label) => label === -1, MIN_WITHOUT), () => true, MIN_LIKELY_SLICES);
}

/** Two runs of numbers that alternate from slice to slice, as 1, 47, 2, 48: two passes that no tag tells apart. */
function ramps(numbers: (number | null)[]): Label[] {
  const own = numbers.slice(2).map((n, i) => (n === null || numbers[i] === null ? null : n - numbers[i]!));
  const alternate = numbers.length >= 2 * MIN_WITHOUT && Math.abs(own[0] ?? 0) === 1 && own.every((n) => n === own[0]);
  return numbers.map((_, index) => (alternate ? index % 2 : null));
}

/** Whether the groups are anything but blocks one above the other. */
function lieInOneAnother(labels: Label[], places: number[]): boolean {
  const told = labels.flatMap((label, i) => (label === null ? [] : [{ label, place: places[i]! }]));
  const changes = told.slice(1).filter((above, i) => above.label !== told[i]!.label).length;
  const shared = told.slice(1).some((above, i) => above.label !== told[i]!.label && above.place === told[i]!.place);
  return shared || 1 + changes > new Set(told.map((t) => t.label)).size;
}

/** Groups of slices that each are blocks by every tag, and the tags that it took to part them. */
function parted(keys: [string, Label[]][], places: number[]): { groups: number[][]; woven: string[] } {
  let groups = [places.map((_, i) => i)];
  const woven: string[] = [];
  for (const [name, labels] of keys) {
    if (!groups.some((group) => lieInOneAnother(group.map((i) => labels[i]!), group.map((i) => places[i]!)))) continue;
    groups = groups.flatMap((group) => {
      const parts = new Map<Label, number[]>();
      for (const i of group) parts.set(labels[i]!, [...(parts.get(labels[i]!) ?? []), i]);
      return [...parts.values()];
    });
    woven.push(name);
  }
  return { groups, woven };
}

function startS(group: number[], found: Acquired[]): number {
  const times = group.map((i) => found[i]!.timeS).filter((time) => time !== null);
  return times.length ? Math.min(...times) : 0;
}

/** Number of an acquisition to its slices: AcquisitionNumber where that tells them apart, else counted by time. */
function numberedGroups(groups: number[][], found: Acquired[]): Map<number, number[]> {
  const members = [...groups].sort((a, b) => startS(a, found) - startS(b, found) || a[0]! - b[0]!);
  const own = members.map((group) => new Set(group.map((i) => found[i]!.marks[0]!)));
  const single = own.filter((marks) => marks.size === 1).map((marks) => [...marks][0]!)
    .filter((text) => /^-?\d{1,9}$/.test(text));
  if (new Set(single).size !== members.length) return new Map(members.map((group, i) => [i + 1, group]));
  return new Map(members.map((group, i): [number, number[]] => [Number(single[i]), group]).sort(([a], [b]) => a - b));
}
