/** The worker: one scan from file to labels, then it is ended. All that is heavy happens here. */
import { AppError } from "./core/errors.ts";
import { inflatedNifti } from "./core/inflate.ts";
import { demandFits } from "./core/memory.ts";
import { describedModel } from "./core/model.ts";
import { readNifti, type Volume } from "./core/nifti.ts";
import { labelsNifti, viewerNifti } from "./core/niftiWrite.ts";
import { prepare, segmentPrepared, type Prepared, type Progress } from "./core/segment.ts";
import type { Report, Start } from "./protocol.ts";
import { loadPredictor, threadCount, type Model } from "./runtime.ts";

self.onmessage = (event: MessageEvent<Start>) => {
  segmentFile(event.data).catch((error: unknown) => {
    const known = error instanceof AppError ? error
      : error instanceof RangeError && /allocation|length/i.test(error.message)
        ? new AppError("MEMORY", event.data.file.name, "this browser has no memory for the scan",
          "close other tabs, or use a machine with more memory")
        : new AppError("INTERNAL", event.data.file.name, String(error), "report it, without the scan");
    say({ type: "error", code: known.code, message: known.message });
  });
};

function say(report: Report, transfer: Transferable[] = []) {
  self.postMessage(report, { transfer });
}

async function segmentFile({ file, base, budget }: Start) {
  const started = performance.now();
  say({ type: "stage", text: "Reading the scan" });
  const model = await fetchedModel(base);
  const { description } = model;
  const bytes = await inflatedNifti(file, file.name, (header) => demandFits(header, description, budget, file.name));
  const volume = readNifti(bytes, file.name);
  showScan(volume);
  say({ type: "stage", text: "Preparing the scan" });
  const prepared = prepare(volume.voxels, volume.shape, volume.spacingMm, description);
  volume.voxels = new Float32Array(0);
  remarkSmallScan(prepared, model);
  say({ type: "threads", count: threadCount(), isolated: self.crossOriginIsolated });
  say({ type: "stage", text: "Loading the model" });
  const predict = await loadPredictor(base, model);
  say({ type: "stage", text: "Segmenting" });
  const labels = await segmentPrepared(prepared, description, predict, withTimeLeft());
  finish(labels, volume, prepared, model, started);
}

async function fetchedModel(base: string): Promise<Model> {
  const response = await fetch(`${base}model/model.json`).catch(() => null);
  if (!response?.ok) {
    throw new AppError("NO_MODEL", "model.json", "this folder holds no model",
      "make it with autosam3d export-web MODEL FOLDER");
  }
  const json = (await response.json()) as { weights?: { sha256?: string } };
  return { description: describedModel(json), sha256: String(json.weights?.sha256) };
}

function showScan({ voxels, shape, affine, warnings }: Volume) {
  // Not Int16Array.from, which makes a list of all numbers first.
  const shown = new Int16Array(voxels.length);
  for (let i = 0; i < shown.length; i++) shown[i] = Math.min(Math.max(Math.round(voxels[i]!), -32768), 32767);
  const nifti = viewerNifti(shown, shape, affine, false).buffer as ArrayBuffer;
  say({ type: "scan", nifti, shape, warnings }, [nifti]);
}

/** The model has seldom seen so much air, or none in training. */
function remarkSmallScan({ undo: { preparedShape } }: Prepared, { description: { patch } }: Model) {
  if (preparedShape.every((n, i) => n >= patch[i]!)) return;
  say({ type: "remark", text: `The scan is smaller than the model's window (${preparedShape.join(" x ")} of `
    + `${patch.join(" x ")} voxels, cropped and resampled): air was put around it.` });
}

/** Progress with the time that the rest will take, by what the windows took so far. */
function withTimeLeft(): Progress {
  const started = performance.now();
  return (done, total) => {
    const seconds = (performance.now() - started) / 1000;
    say({ type: "progress", done, total, secondsLeft: (seconds / done) * (total - done) });
  };
}

function finish(labels: Uint8Array, volume: Volume, { undo }: Prepared, { description }: Model, started: number) {
  const counts = Array<number>(description.numOutputs).fill(0);
  for (const label of labels) counts[label]!++;
  const file = labelsNifti(labels, volume.source, volume.raw, description.organs).buffer as ArrayBuffer;
  const shown = viewerNifti(labels, undo.nativeShape, volume.affine, true).buffer as ArrayBuffer;
  say({ type: "done", shown, file, counts, voxelMl: volume.spacingMm.reduce((a, b) => a * b, 1) / 1000,
    seconds: (performance.now() - started) / 1000 }, [shown, file]);
}
