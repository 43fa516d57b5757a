/** The list of organs: show and hide each, its colour, its volume in millilitres. */
import type { Organ } from "../core/model.ts";

export interface FoundOrgan extends Organ {
  voxels: number;
  ml: number;
  /** Mean probability of its voxels, 0 to 1. */
  confidence: number;
}

export class OrganList {
  private boxes = new Map<number, HTMLInputElement>();

  constructor(private readonly list: HTMLUListElement, private readonly onChange: (visible: Set<number>) => void,
    private readonly onFind: (label: number) => void) {}

  fill(organs: FoundOrgan[]) {
    this.boxes = new Map();
    this.list.replaceChildren(...organs.map((organ) => this.row(organ)));
  }

  setAll(shown: boolean) {
    for (const box of this.boxes.values()) box.checked = shown && !box.disabled;
    this.changed();
  }

  private row({ value, name, rgb, voxels, ml, confidence }: FoundOrgan): HTMLLIElement {
    const box = document.createElement("input");
    Object.assign(box, { type: "checkbox", checked: voxels > 0, disabled: voxels === 0 });
    box.addEventListener("change", () => {
      this.changed();
      if (box.checked) this.onFind(value);
    });
    const swatch = document.createElement("i");
    swatch.style.background = `rgb(${rgb.join(" ")})`;
    const text = document.createElement("span");
    text.textContent = name.replaceAll("_", " ");
    const volume = document.createElement("b");
    volume.textContent = voxels ? `${ml.toFixed(1)} ml` : "not found";
    const sure = document.createElement("small");
    sure.textContent = `${(100 * confidence).toFixed(0)} % sure`;
    sure.title = "Mean probability that the model gives its voxels; not a chance of being right";
    const label = document.createElement("label");
    label.append(box, swatch, text, volume, ...(voxels ? [sure] : []));
    const item = document.createElement("li");
    item.append(label);
    this.boxes.set(value, box);
    return item;
  }

  private changed() {
    this.onChange(new Set([...this.boxes].filter(([, box]) => box.checked).map(([value]) => value)));
  }
}

/** The list as comma-separated values. */
export function volumesCsv(organs: FoundOrgan[]): string {
  const quoted = (text: string) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const rows = organs.map(({ value, name, voxels, ml, confidence }) =>
    `${value},${quoted(name)},${voxels},${ml.toFixed(3)},${voxels ? confidence.toFixed(4) : ""}`);
  return ["label,organ,voxels,volume_ml,confidence", ...rows, ""].join("\n");
}
