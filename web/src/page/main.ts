/** The page: a file in, organs over the CT out. Nothing leaves the device. */
import type { SeriesChoice } from "../core/dicomChoice.ts";
import { budgetBytes } from "../core/memory.ts";
import { describedModel, type ModelDescription } from "../core/model.ts";
import { gzipped } from "../core/niftiWrite.ts";
import type { Report, Start } from "../protocol.ts";
import { keepOffline } from "./offline.ts";
import { droppedFiles, givenName, listedFiles, type Given } from "./givenFiles.ts";
import { OrganList, volumesCsv, type FoundOrgan } from "./organList.ts";
import { Viewer, type View } from "./viewer.ts";

const element = <T extends HTMLElement>(id: string) => document.getElementById(id) as T;
const stage = element("stage");
const fileInput = element<HTMLInputElement>("file");
const viewer = new Viewer(element<HTMLCanvasElement>("canvas"));
const list = new OrganList(element<HTMLUListElement>("organs"), (visible) => viewer.showOrgans(visible),
  (label) => viewer.goTo(label));
const base = new URL("./", document.baseURI).href;

let worker: Worker | null = null;
let description: ModelDescription | null = null;
let found: FoundOrgan[] = [];
let result: { nifti: ArrayBuffer; seg: ArrayBuffer | null; stem: string } | null = null;
let used = false;

function show(id: string, shown: boolean) {
  element(id).hidden = !shown;
}

function tell(text: string) {
  element("status").textContent = text;
}

function fail(message: string) {
  endWork();
  tell("");
  element("error").textContent = message;
  show("error", true);
}

function endWork() {
  worker?.terminate();
  worker = null;
  show("work", false);
  show("cancel", false);
}

function open(files: Given[]) {
  if (!files.length) return;
  used = true;
  endWork();
  result = null;
  for (const id of ["error", "result", "warnings", "choice", "graphics-state"]) show(id, false);
  start(files);
}

function start(files: Given[], series?: string) {
  const name = givenName(files);
  element<HTMLProgressElement>("bar").removeAttribute("value");
  element("left").textContent = "";
  show("work", true);
  show("cancel", true);
  tell("Starting");
  worker = new Worker(new URL("../worker.ts", import.meta.url), { type: "module", name: "segment" });
  // Reports are handled one after another: labels must not be laid over a scan that is not there yet.
  let line = Promise.resolve();
  const mine = worker;
  worker.onmessage = ({ data }: MessageEvent<Report>) => {
    line = line.then(() => (mine === worker ? onReport(data, files) : undefined))
      .catch((error: unknown) => fail(`The viewer failed (${String(error)}); reload the page`));
  };
  worker.onerror = (event) => fail(`The worker failed (${event.message || "no reason given"}); reload the page`);
  const device = (navigator as { deviceMemory?: number }).deviceMemory;
  const order: Start = { files, name, base, budget: budgetBytes(device), series,
    graphics: element<HTMLInputElement>("graphics").checked };
  worker.postMessage(order);
}

async function onReport(report: Report, files: Given[]) {
  switch (report.type) {
    case "stage": return tell(`${report.text} …`);
    case "threads": return tellThreads(report.count, report.isolated);
    case "graphics": return tellGraphics(report.fault);
    case "scan": return onScan(report);
    case "remark": return addRemark(report.text);
    case "choose": return onChoose(report.choices, files);
    case "reading": return onReading(report);
    case "progress": return onProgress(report);
    case "done": return onDone(report, givenName(files));
    case "error": return fail(report.message);
  }
}

function tellThreads(count: number, isolated: boolean) {
  element("threads").textContent = isolated ? `Computing with ${count} thread${count === 1 ? "" : "s"}.`
    : "Computing with one thread: the web server does not send the headers that threads need (COOP and COEP), and "
      + "this page could not add them. It works, more slowly.";
}

function tellGraphics(fault: string | null) {
  element("graphics-state").textContent = fault === null
    ? "Computing on the graphics card: on a window of this scan it gave what WebAssembly gives."
    : `Not computing on the graphics card, but on WebAssembly: ${fault}.`;
  show("graphics-state", true);
}

/** The choice is there only where the browser has a graphics card to offer; nothing of it is loaded before it is taken. */
async function offerGraphics() {
  const { gpu } = navigator as { gpu?: { requestAdapter(): Promise<object | null> } };
  const adapter = await gpu?.requestAdapter().catch(() => null);
  show("graphics-choice", Boolean(adapter));
}

async function onScan({ nifti, warnings }: Extract<Report, { type: "scan" }>) {
  show("drop", false);
  show("canvas", true);
  show("views", true);
  element("warnings").replaceChildren();
  warnings.forEach(addRemark);
  document.querySelector<HTMLInputElement>("input[name=view][value=all]")!.checked = true;
  await viewer.showScan(nifti);
}

function addRemark(text: string) {
  const item = document.createElement("li");
  item.textContent = text;
  element("warnings").append(item);
  show("warnings", true);
}

function onProgress({ done, total, secondsLeft }: Extract<Report, { type: "progress" }>) {
  const percent = Math.floor((100 * done) / total);
  element<HTMLProgressElement>("bar").value = percent;
  element("left").textContent = `${percent} %, window ${done} of ${total}, ${timeText(secondsLeft)} left`;
}

function onReading({ done, total }: Extract<Report, { type: "reading" }>) {
  element<HTMLProgressElement>("bar").value = Math.floor((100 * done) / total);
  element("left").textContent = `${Math.floor((100 * done) / total)} % of the slices read`;
}

/** Several series: a button each, and the chosen one is read. */
function onChoose(choices: SeriesChoice[], files: Given[]) {
  endWork();
  tell(`Found ${choices.length} CT series. Choose one.`);
  element("series").replaceChildren(...choices.map(({ key, title, slices, rows, columns }) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = `${title || `series ${key}`}: ${slices} slices of ${columns} x ${rows}`;
    button.addEventListener("click", () => {
      show("choice", false);
      start(files, key);
    });
    const row = document.createElement("li");
    row.append(button);
    return row;
  }));
  show("choice", true);
  element("series").querySelector("button")?.focus();
}

function timeText(seconds: number | null): string {
  if (seconds === null) return "some time";
  return seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`;
}

async function onDone(report: Extract<Report, { type: "done" }>, name: string) {
  endWork();
  if (!description) return;
  found = description.organs.map((organ) => ({ ...organ, voxels: report.counts[organ.value]!,
    ml: report.counts[organ.value]! * report.voxelMl, confidence: report.confidence[organ.value]! }));
  result = { nifti: report.file, seg: report.seg, stem: name.replace(/\.(nii(\.gz)?|zip|dcm|ima)$/i, "") || "scan" };
  show("seg", report.seg !== null);
  await viewer.showLabels(report.shown, description.organs, element<HTMLInputElement>("opacity").valueAsNumber / 100);
  list.fill(found);
  const largest = [...found].sort((a, b) => b.voxels - a.voxels)[0];
  if (largest?.voxels) viewer.goTo(largest.value);
  show("result", true);
  const number = found.filter((organ) => organ.voxels > 0).length;
  tell(`Done in ${timeText(report.seconds)}: ${number} of ${found.length} organs found.`);
}

function download(blob: Blob, name: string) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

async function describe() {
  try {
    const response = await fetch(`${base}model/model.json`);
    if (!response.ok) throw new Error("absent");
    description = describedModel(await response.json());
    const names = description.organs.map((organ) => organ.name.replaceAll("_", " ")).join(", ");
    element("model").textContent = `${description.name}: ${names}`;
  } catch (error) {
    element("model").textContent = "";
    fail(error instanceof Error && error.message !== "absent" ? error.message
      : "This folder holds no model; make it with autosam3d export-web MODEL FOLDER");
  }
}

function wire() {
  fileInput.addEventListener("change", () => {
    open(listedFiles(fileInput.files));
    fileInput.value = "";
  });
  const folderInput = element<HTMLInputElement>("folder");
  folderInput.addEventListener("change", () => {
    open(listedFiles(folderInput.files));
    folderInput.value = "";
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    stage.classList.add("over");
  });
  document.addEventListener("dragleave", () => stage.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    stage.classList.remove("over");
    if (event.dataTransfer) droppedFiles(event.dataTransfer).then(open, (error: unknown) => fail(String(error)));
  });
  element("cancel").addEventListener("click", () => {
    endWork();
    tell("Cancelled.");
  });
  element("all").addEventListener("click", () => list.setAll(true));
  element("none").addEventListener("click", () => list.setAll(false));
  element("opacity").addEventListener("input", (event) =>
    viewer.setOpacity((event.target as HTMLInputElement).valueAsNumber / 100));
  element("views").addEventListener("change", (event) =>
    viewer.setView((event.target as HTMLInputElement).value as View));
  element("nifti").addEventListener("click", async () => {
    if (result) download(await gzipped(new Uint8Array(result.nifti)), `${result.stem}_seg.nii.gz`);
  });
  element("seg").addEventListener("click", () => {
    if (result?.seg) download(new Blob([result.seg], { type: "application/dicom" }), `${result.stem}.seg.dcm`);
  });
  element("csv").addEventListener("click", () => {
    if (result) download(new Blob([volumesCsv(found)], { type: "text/csv" }), `${result.stem}_volumes.csv`);
  });
}

wire();
void describe();
void offerGraphics();
void keepOffline(() => !used);
