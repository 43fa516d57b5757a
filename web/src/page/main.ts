/** The page: a file in, organs over the CT out. Nothing leaves the device. */
import { budgetBytes } from "../core/memory.ts";
import { describedModel, type ModelDescription } from "../core/model.ts";
import { gzipped } from "../core/niftiWrite.ts";
import type { Report, Start } from "../protocol.ts";
import { keepOffline } from "./offline.ts";
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
let result: { nifti: ArrayBuffer; stem: string } | null = null;
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

function open(files: FileList | null | undefined) {
  if (!files?.length) return;
  used = true;
  endWork();
  result = null;
  for (const id of ["error", "result", "warnings"]) show(id, false);
  if (files.length > 1) {
    fail("Expected one file, got several; a DICOM series is not read here yet: convert it to one .nii.gz file");
    return;
  }
  start(files[0]!);
}

function start(file: File) {
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
    line = line.then(() => (mine === worker ? onReport(data, file.name) : undefined))
      .catch((error: unknown) => fail(`The viewer failed (${String(error)}); reload the page`));
  };
  worker.onerror = (event) => fail(`The worker failed (${event.message || "no reason given"}); reload the page`);
  const device = (navigator as { deviceMemory?: number }).deviceMemory;
  const order: Start = { file, base, budget: budgetBytes(device) };
  worker.postMessage(order);
}

async function onReport(report: Report, name: string) {
  switch (report.type) {
    case "stage": return tell(`${report.text} …`);
    case "threads": return tellThreads(report.count, report.isolated);
    case "scan": return onScan(report);
    case "remark": return addRemark(report.text);
    case "progress": return onProgress(report);
    case "done": return onDone(report, name);
    case "error": return fail(report.message);
  }
}

function tellThreads(count: number, isolated: boolean) {
  element("threads").textContent = isolated ? `Computing with ${count} thread${count === 1 ? "" : "s"}.`
    : "Computing with one thread: the web server does not send the headers that threads need (COOP and COEP), and "
      + "this page could not add them. It works, more slowly.";
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

function timeText(seconds: number | null): string {
  if (seconds === null) return "some time";
  return seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`;
}

async function onDone(report: Extract<Report, { type: "done" }>, name: string) {
  endWork();
  if (!description) return;
  found = description.organs.map((organ) => ({ ...organ, voxels: report.counts[organ.value]!,
    ml: report.counts[organ.value]! * report.voxelMl }));
  result = { nifti: report.file, stem: name.replace(/\.nii(\.gz)?$/i, "") || "scan" };
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
    open(fileInput.files);
    fileInput.value = "";
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    stage.classList.add("over");
  });
  document.addEventListener("dragleave", () => stage.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    stage.classList.remove("over");
    const item = event.dataTransfer?.items[0]?.webkitGetAsEntry?.();
    if (item?.isDirectory) fail("A folder of DICOM slices is not read here yet: convert it to one .nii.gz file");
    else open(event.dataTransfer?.files);
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
  element("csv").addEventListener("click", () => {
    if (result) download(new Blob([volumesCsv(found)], { type: "text/csv" }), `${result.stem}_volumes.csv`);
  });
}

wire();
void describe();
void keepOffline(() => !used);
