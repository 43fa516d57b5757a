/** How much memory a scan will need in the browser, and how much it may take: said before the start. */
import { AppError, sizeText } from "./errors.ts";
import type { ModelDescription } from "./model.ts";
import { columnLengths, type Affine, type Triple } from "./grid.ts";

const MARGIN = 1.1;
/** Page, viewer and the runtime's own code, as the renderer process of Chromium showed it. */
const BASE_BYTES = 280 << 20;
/** Where a browser does not say what the device has. */
const UNKNOWN_DEVICE_GB = 4;

/** What is known of a scan before it is read; both in the file's own axis order. */
export interface ScanSize {
  shape: Triple;
  affine: Affine;
  /** Of the file, or of what exists of the files at once, and of slices that are to be resampled. */
  fileBytes: number;
}

/**
 * Bytes at the moment when most exists together: either the file is being read, or windows are being worked through.
 *
 * `runtimes` are those that hold the network: WebAssembly, and with it the graphics card's where that is asked for.
 */
export function estimateBytes(header: ScanSize, model: ModelDescription, runtimes = 1): number {
  const voxels = header.shape.reduce((a, b) => a * b, 1);
  const spacing = columnLengths(header.affine);
  // The prepared grid in the file's own axis order: the crop can only make it smaller.
  const target = model.spacingMm ?? spacing;
  const mm3 = spacing.reduce((a, b) => a * b, 1) / target.reduce((a, b) => a * b, 1);
  const prepared = Math.max(voxels * mm3, model.patch.reduce((a, b) => a * b, 1));
  const plane = prepared / Math.max(1, (Math.max(...header.shape) * Math.min(...spacing)) / Math.max(...target));
  const sums = 4 * (model.numOutputs + 1) * model.patch[0] * plane;
  // The viewer's own: 16-bit CT and labels, on this side and on the graphics card.
  const shown = 2 * 3 * voxels;
  const reading = header.fileBytes + 4 * voxels + shown;
  const working = 4 * prepared + sums + voxels + shown + runtimes * runtimeBytes(model);
  return BASE_BYTES + MARGIN * Math.max(reading, working);
}

/** What the runtime takes for one window; where the export does not say, by the size of the window. */
function runtimeBytes(model: ModelDescription): number {
  return model.runtimeBytes || 500 * model.patch.reduce((a, b) => a * b, 1);
}

/** Half of what the device has, as far as the browser says; a tab gets 4 GB at most. */
export function budgetBytes(deviceGb: number | undefined): number {
  return Math.min(4, (deviceGb ?? UNKNOWN_DEVICE_GB) / 2) * (1 << 30);
}

/** Refuses a scan that will not fit, before anything large is allocated. */
export function demandFits(header: ScanSize, model: ModelDescription, budget: number, where: string) {
  const need = estimateBytes(header, model);
  if (need <= budget) return;
  throw new AppError("MEMORY", where, `the scan (${header.shape.join(" x ")} voxels) needs about ${sizeText(need)}, `
    + `this device can give ${sizeText(budget)}`, "crop the scan, or use a machine with more memory");
}
