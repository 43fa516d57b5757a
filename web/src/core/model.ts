/** What an export's model.json says of running its network: the part `use`, checked. */
import { AppError } from "./errors.ts";
import type { Triple } from "./grid.ts";
import type { Bounds } from "./parity.ts";

const MAX_OVERLAP = 0.9;

export interface Organ {
  value: number;
  name: string;
  rgb: Triple;
  /** SNOMED CT concept, null where none is known. */
  snomed: string | null;
}

export interface ModelDescription {
  name: string;
  /** Of the program that exported it. */
  version: string;
  patch: Triple;
  /** (z, y, x); null keeps the scan's own. */
  spacingMm: Triple | null;
  cropToBody: boolean;
  huWindow: [number, number];
  subtractHu: number;
  divideHu: number;
  air: number;
  overlap: number;
  gaussian: boolean;
  organs: Organ[];
  /** K: organs and background. */
  numOutputs: number;
  /** Memory of the runtime for one patch, as it was measured at the export; 0 where it is unknown. */
  runtimeBytes: number;
  /** What another runtime must keep to be believed. */
  bounds: Bounds;
}

/** The description of a parsed model.json. */
export function describedModel(json: unknown): ModelDescription {
  const meta = json as Record<string, any>;
  const use = meta?.use as Record<string, any> | undefined;
  const fault = (what: string) => new AppError("CORRUPT", "model.json", `expected ${what}`, "export the model again");
  if (!use || typeof use !== "object") throw fault("a description of use");
  const numbers = (value: unknown, count: number, what: string): number[] => {
    if (!Array.isArray(value) || value.length !== count || !value.every((v) => Number.isFinite(v))) throw fault(what);
    return value as number[];
  };
  const number = (value: unknown, what: string): number => numbers([value], 1, what)[0]!;
  const patch = numbers(use.patch, 3, "a patch of three numbers") as Triple;
  if (!Array.isArray(use.labels) || use.labels.length < 2) throw fault("labels");
  const organs = use.labels.slice(1).map((label: any, i: number): Organ => {
    if (label?.value !== i + 1 || typeof label.name !== "string") throw fault("labels counted from 0");
    return { value: label.value, name: label.name, rgb: numbers(label.rgb, 3, "a colour of each organ") as Triple,
      snomed: typeof label.snomed === "string" && /^\d{1,16}$/.test(label.snomed) ? label.snomed : null };
  });
  const overlap = number(use.overlap, "overlap");
  // Each voxel is seen a thousand times there.
  if (overlap < 0 || overlap > MAX_OVERLAP) throw fault(`an overlap of 0 to ${MAX_OVERLAP}, got ${overlap}`);
  const memory = meta.memory?.onnxruntime;
  return {
    name: String(meta.recipe?.name ?? "model"),
    version: String(meta.autosam3d ?? "").slice(0, 16),
    patch,
    spacingMm: use.spacing_mm === null ? null : numbers(use.spacing_mm, 3, "spacing_mm") as Triple,
    cropToBody: use.crop_to_body === true,
    huWindow: numbers(use.hu_window, 2, "hu_window") as [number, number],
    subtractHu: number(use.subtract_hu, "subtract_hu"),
    divideHu: number(use.divide_hu, "divide_hu"),
    air: number(use.air, "air"),
    overlap,
    gaussian: String(use.importance).startsWith("gaussian"),
    organs,
    numOutputs: organs.length + 1,
    runtimeBytes: Number.isFinite(memory) && memory > 0 ? memory : 0,
    bounds: { logitShare: number(meta.bounds?.logit_share, "bounds.logit_share"),
      equalShare: number(meta.bounds?.equal_share, "bounds.equal_share"), dice: number(meta.bounds?.dice, "bounds.dice"),
      diceVoxels: number(meta.bounds?.dice_judged_from_voxels, "bounds.dice_judged_from_voxels") },
  };
}
