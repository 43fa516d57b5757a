/** The service worker: keeps the page on the device, and brings the headers that threads need. */

const RELOADED = "autosam3d-reloaded";

/**
 * Registers it. Where the web server sends no headers for threads, the page is loaded once more under the service
 * worker, which does; `mayReload` is asked first, for a page in use must not vanish.
 */
export async function keepOffline(mayReload: () => boolean): Promise<void> {
  if (!("serviceWorker" in navigator) || !import.meta.env.PROD) return;
  try {
    await navigator.serviceWorker.register(new URL("./sw.js", document.baseURI), { updateViaCache: "none" });
    await navigator.serviceWorker.ready;
  } catch {
    return; // Private windows and plain http allow none; the page works without.
  }
  if (self.crossOriginIsolated || sessionStorage.getItem(RELOADED) || !mayReload()) return;
  sessionStorage.setItem(RELOADED, "yes");
  location.reload();
}
