/** Does one runtime say what another said? The measures of `export/parity.py` on one window, with the export's bounds. */
import type { ModelDescription } from "./model.ts";

/** Of one window: [K, D, H, W] each. */
export interface Answer {
  logits: Float32Array;
  probs: Float32Array;
}

/** What the certificate of an export asks of a runtime; model.json says it. */
export interface Bounds {
  /** Largest difference of logits, as a share of the largest absolute logit. */
  logitShare: number;
  /** Least share of equal labels. */
  equalShare: number;
  /** Least Dice of each organ, judged from `diceVoxels` voxels on. */
  dice: number;
  diceVoxels: number;
}

/** What is out of bounds, one clause each. */
export function parityFaults(reference: Answer, other: Answer, { bounds, organs, numOutputs }: ModelDescription
): string[] {
  const voxels = reference.logits.length / numOutputs;
  let [scale, difference] = [0, 0];
  for (let i = 0; i < reference.logits.length; i++) {
    scale = Math.max(scale, Math.abs(reference.logits[i]!));
    difference = Math.max(difference, Math.abs(reference.logits[i]! - other.logits[i]!));
  }
  const faults: string[] = [];
  // Said in the positive, so that it is false where a number is NaN.
  if (!(difference <= bounds.logitShare * scale)) {
    faults.push(`logits differ by ${(difference / scale).toPrecision(2)} of their scale, allowed ${bounds.logitShare}`);
  }
  const [truth, labels] = [labelsOf(reference.logits, voxels, numOutputs), labelsOf(other.logits, voxels, numOutputs)];
  const [there, found, both] = [0, 1, 2].map(() => Array<number>(numOutputs).fill(0)) as [number[], number[], number[]];
  for (let i = 0; i < voxels; i++) {
    there[truth[i]!]!++;
    found[labels[i]!]!++;
    if (truth[i] === labels[i]) both[truth[i]!]!++;
  }
  const equal = both.reduce((a, b) => a + b, 0) / voxels;
  if (!(equal >= bounds.equalShare)) {
    faults.push(`${(100 * equal).toFixed(3)} % of the labels are equal, needed ${100 * bounds.equalShare} %`);
  }
  for (const { value, name } of organs) {
    const dice = (2 * both[value]!) / (there[value]! + found[value]!);
    if (there[value]! >= bounds.diceVoxels && !(dice >= bounds.dice)) {
      faults.push(`Dice of ${name} is ${dice.toFixed(4)}, needed ${bounds.dice}`);
    }
  }
  return faults;
}

/** Whether these can be what a softmax gave: classes of each voxel that sum up to 1. */
export function areProbabilities(probs: Float32Array, numOutputs: number): boolean {
  const voxels = probs.length / numOutputs;
  for (let i = 0; i < voxels; i++) {
    let sum = 0;
    for (let k = 0; k < numOutputs; k++) sum += probs[k * voxels + i]!;
    if (!(Math.abs(sum - 1) <= 1e-3)) return false;
  }
  return true;
}

/** The first of the largest, as NumPy's argmax. */
function labelsOf(logits: Float32Array, voxels: number, numOutputs: number): Uint8Array {
  const labels = new Uint8Array(voxels);
  for (let i = 0; i < voxels; i++) {
    for (let k = 1; k < numOutputs; k++) {
      if (logits[k * voxels + i]! > logits[labels[i]! * voxels + i]!) labels[i] = k;
    }
  }
  return labels;
}
