/** The worker: one scan from file to labels, then it is ended. All that is heavy happens here. */
import { AppError } from "./core/errors.ts";
import { ChoiceError } from "./core/dicomChoice.ts";
import { dicomSeg, readersThatFail } from "./core/dicomSeg.ts";
import { type DicomScan } from "./core/dicomSeries.ts";
import { sourceSeries, type SourceSeries } from "./core/dicomSource.ts";
import { estimateBytes } from "./core/memory.ts";
import { describedModel } from "./core/model.ts";
import type { Volume } from "./core/nifti.ts";
import { labelsNifti, viewerNifti } from "./core/niftiWrite.ts";
import { readGiven } from "./core/scanInput.ts";
import { fullestWindow, prepare, segmentPrepared, type Prepared, type Progress, type Segmented
} from "./core/segment.ts";
import { Graphics, GraphicsFault } from "./graphics.ts";
import type { Report, Start } from "./protocol.ts";
import { fetchedOnnx, loadNetwork, threadCount, type Model, type Network } from "./runtime.ts";

self.onmessage = (event: MessageEvent<Start>) => {
  segmentScan(event.data).catch((error: unknown) => {
    if (error instanceof ChoiceError) return say({ type: "choose", choices: error.choices });
    const known = error instanceof AppError ? error
      : error instanceof RangeError && /allocation|length/i.test(error.message)
        ? new AppError("MEMORY", event.data.name, "this browser has no memory for the scan",
          "close other tabs, or use a machine with more memory")
        : new AppError("INTERNAL", event.data.name, String(error), "report it, without the scan");
    say({ type: "error", code: known.code, message: known.message });
  });
};

function say(report: Report, transfer: Transferable[] = []) {
  self.postMessage(report, { transfer });
}

async function segmentScan(order: Start) {
  const { files, name, base, budget, series } = order;
  const started = performance.now();
  say({ type: "stage", text: "Reading the scan" });
  const model = await fetchedModel(base);
  const { description } = model;
  const volume = await readGiven(files, name, description, budget, { series, progress: readingProgress(),
    jpeg2000: async () => (await import("./jpeg2000.ts")).loadJpeg2000(base) });
  showScan(volume);
  say({ type: "stage", text: "Preparing the scan" });
  const prepared = prepare(volume.voxels, volume.shape, volume.spacingMm, description);
  volume.voxels = new Float32Array(0);
  const dicom = await referredSeries(volume, name);
  remarkSmallScan(prepared, model);
  say({ type: "threads", count: threadCount(), isolated: self.crossOriginIsolated });
  say({ type: "stage", text: "Loading the model" });
  const onnx = await fetchedOnnx(base, model.sha256);
  const wasm = await loadNetwork(base, onnx, description);
  const card = order.graphics ? await checkedCard(order, onnx, volume, prepared, model, wasm) : null;
  const result = await segmented(prepared, model, wasm, card);
  finish(result, volume, dicom, prepared, model, started);
}

/** The graphics card; null with the reason on the page where it is not to be trusted. */
async function checkedCard({ base, budget }: Start, onnx: Uint8Array, { shape, affine }: Volume, prepared: Prepared,
  { description }: Model, wasm: Network): Promise<Graphics | null> {
  say({ type: "stage", text: "Checking the graphics card" });
  try {
    if (estimateBytes({ shape, affine, fileBytes: 0 }, description, 2) > budget) {
      throw new GraphicsFault("this device's memory is too small for it beside WebAssembly");
    }
    const card = await Graphics.open(base, onnx, description, wasm, fullestWindow(prepared, description));
    say({ type: "graphics", fault: null });
    return card;
  } catch (error) {
    return without(error);
  }
}

/** Labels from the graphics card as long as it is right; from its first fault on, from WebAssembly. */
async function segmented(prepared: Prepared, { description }: Model, wasm: Network, card: Graphics | null
): Promise<Segmented> {
  const onWasm = async (window: Float32Array) => (await wasm(window)).probs;
  const predict = async (window: Float32Array) => {
    if (!card) return onWasm(window);
    return card.probs(window).catch((error: unknown) => {
      card?.end();
      card = without(error);
      return onWasm(window);
    });
  };
  say({ type: "stage", text: "Segmenting" });
  const result = await segmentPrepared(prepared, description, predict, withTimeLeft());
  if (!card) return result;
  try {
    await card.demandRight();
    remarkSlowCard(card);
    return result;
  } catch (error) {
    without(error);
    say({ type: "stage", text: "Segmenting once more" });
    return await segmentPrepared(prepared, description, onWasm, withTimeLeft());
  } finally {
    card.end();
  }
}

/** Says that the card is not used. */
function without(error: unknown): null {
  if (!(error instanceof GraphicsFault)) throw error;
  say({ type: "graphics", fault: error.message });
  return null;
}

function remarkSlowCard({ secondsPerWindow, referenceSeconds }: Graphics) {
  if (secondsPerWindow <= referenceSeconds) return;
  say({ type: "remark", text: `The graphics card took ${secondsPerWindow.toFixed(1)} s a window, WebAssembly `
    + `${referenceSeconds.toFixed(1)} s: without the card it is faster here.` });
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

/** What a DICOM SEG would refer to; null with a remark where none can be made. */
async function referredSeries(volume: Volume | DicomScan, name: string): Promise<SourceSeries | null> {
  if (!("images" in volume)) return null;
  try {
    const first = await volume.images[0]!.source.read(volume.images[0]!.source.size);
    const found = sourceSeries(volume.images.map((image) => image.slice), first, volume.source, name);
    const failing = readersThatFail(volume.source);
    [...found.warnings, ...(failing ? [failing] : [])].forEach((text) => say({ type: "remark", text }));
    return found;
  } catch (error) {
    if (!(error instanceof AppError)) throw error;
    say({ type: "remark", text: `No DICOM SEG can be made: ${error.fault}.` });
    return null;
  }
}

/** At most ten reports a second: a series has many files. */
function readingProgress(): Progress {
  let last = 0;
  return (done, total) => {
    if (performance.now() - last < 100 && done < total) return;
    last = performance.now();
    say({ type: "reading", done, total });
  };
}

function finish({ labels, confidence }: Segmented, volume: Volume, dicom: SourceSeries | null, { undo }: Prepared,
  { description, sha256 }: Model, started: number) {
  const counts = Array<number>(description.numOutputs).fill(0);
  for (const label of labels) counts[label]!++;
  const file = labelsNifti(labels, volume.source, volume.raw, description.organs).buffer as ArrayBuffer;
  const by = { name: `autosam3d ${description.name}`, version: description.version, sha256 };
  const seg = (dicom && dicomSeg(labels, volume.source, dicom, description.organs, by, new Date())?.buffer) ?? null;
  const shown = viewerNifti(labels, undo.nativeShape, volume.affine, true).buffer as ArrayBuffer;
  say({ type: "done", shown, file, seg: seg as ArrayBuffer | null, counts, confidence, voxelMl: volume.spacingMm.reduce((a, b) => a * b, 1) / 1000,
    seconds: (performance.now() - started) / 1000 },
    [shown, file, ...(seg ? [seg as ArrayBuffer] : [])]);
}
