/** The CT with its organs on a canvas: NiiVue in three planes and 3D. */
import { MULTIPLANAR_TYPE, NVImage, Niivue, SHOW_RENDER, SLICE_TYPE } from "@niivue/niivue";
import type { Organ } from "../core/model.ts";

/** Where the voxels of `viewerNifti` begin. */
const LABELS_AT = 352;
const VIEWS = { all: SLICE_TYPE.MULTIPLANAR, axial: SLICE_TYPE.AXIAL, coronal: SLICE_TYPE.CORONAL,
  sagittal: SLICE_TYPE.SAGITTAL, "3d": SLICE_TYPE.RENDER } as const;
export type View = keyof typeof VIEWS;
/** Soft tissue and bone both stay visible. */
const SHOWN_HU = [-160, 340] as const;

export class Viewer {
  private readonly nv: Niivue;
  private ready: Promise<unknown> | null = null;
  private labels: NVImage | null = null;
  private truth: Uint8Array = new Uint8Array(0);

  constructor(private readonly canvas: HTMLCanvasElement) {
    this.nv = new Niivue({
      dragAndDropEnabled: false, isColorbar: false, backColor: [0, 0, 0, 1], crosshairColor: [0.44, 0.72, 0.88, 0.8],
      multiplanarShowRender: SHOW_RENDER.ALWAYS, multiplanarLayout: MULTIPLANAR_TYPE.GRID, multiplanarPadPixels: 4,
      crosshairWidth: 0.6, crosshairWidthUnit: "mm", loadingText: "", show3Dcrosshair: true,
      isRadiologicalConvention: true, sagittalNoseLeft: false, logLevel: "silent",
    });
    canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  /** A CT as `viewerNifti` writes it; the organs of an earlier scan go. */
  async showScan(nifti: ArrayBuffer) {
    await this.attached();
    for (const volume of [...this.nv.volumes]) this.nv.removeVolume(volume);
    this.labels = null;
    const image = await NVImage.loadFromUrl({ url: "scan.nii", name: "scan.nii", buffer: nifti, colormap: "gray",
      cal_min: SHOWN_HU[0], cal_max: SHOWN_HU[1] });
    this.nv.addVolume(image);
    this.nv.setSliceType(SLICE_TYPE.MULTIPLANAR);
  }

  /** Labels as `viewerNifti` writes them, over the CT. */
  async showLabels(nifti: ArrayBuffer, organs: Organ[], opacity: number) {
    this.truth = new Uint8Array(nifti.slice(LABELS_AT));
    const image = await NVImage.loadFromUrl({ url: "organs.nii", name: "organs.nii", buffer: nifti, opacity });
    const of = (channel: number) => [0, ...organs.map((organ) => organ.rgb[channel]!)];
    image.setColormapLabel({ R: of(0), G: of(1), B: of(2), A: [0, ...organs.map(() => 255)],
      I: [0, ...organs.map((organ) => organ.value)], labels: ["", ...organs.map((organ) => organ.name)] });
    // The scene holds no legend: the list beside it is one.
    if (image.colormapLabel) delete image.colormapLabel.labels;
    this.nv.addVolume(image);
    this.labels = image;
    this.nv.updateGLVolume();
  }

  /** Only the organs whose label is in `visible`. */
  showOrgans(visible: Set<number>) {
    const shown = this.labels?.img as Uint8Array | undefined;
    if (!shown) return;
    for (let i = 0; i < shown.length; i++) shown[i] = visible.has(this.truth[i]!) ? this.truth[i]! : 0;
    this.nv.updateGLVolume();
  }

  setOpacity(share: number) {
    if (this.labels) this.nv.setOpacity(1, share);
  }

  setView(view: View) {
    this.nv.setSliceType(VIEWS[view]);
  }

  /** The cross-hair in the middle of an organ's voxels, so that showing it also finds it. */
  goTo(label: number) {
    const dims = this.labels?.hdr?.dims;
    if (!dims) return;
    const [nx, ny] = [dims[1]!, dims[2]!];
    let [count, x, y, z] = [0, 0, 0, 0];
    this.truth.forEach((value, i) => {
      if (value !== label) return;
      count++;
      x += i % nx;
      y += Math.trunc(i / nx) % ny;
      z += Math.trunc(i / (nx * ny));
    });
    if (!count || !this.labels) return;
    this.nv.scene.crosshairPos = this.labels.convertVox2Frac([x / count, y / count, z / count] as never);
    this.nv.drawScene();
  }

  private attached(): Promise<unknown> {
    this.ready ??= this.nv.attachToCanvas(this.canvas);
    return this.ready;
  }

  private onKey(event: KeyboardEvent) {
    const step = { ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0],
      PageUp: [0, 0, 1], PageDown: [0, 0, -1] }[event.key];
    if (!step || !this.nv.volumes.length) return;
    event.preventDefault();
    this.nv.moveCrosshairInVox(step[0]!, step[1]!, step[2]!);
  }
}
