// Keeps the whole page on the device, so that it works offline, and puts on every answer the headers that allow
// threads and forbid requests elsewhere, whatever the web server sends.
// `later` names files that are kept from their first use on.
const BUILD = { version: "dev", files: [], later: [] };

const CACHE = `autosam3d ${BUILD.version}`;
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Content-Security-Policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; "
    + "connect-src 'self' data: blob:; img-src 'self' data: blob:; style-src 'self'; font-src 'self' data:; "
    + "manifest-src 'self'; base-uri 'none'; form-action 'none'",
  "Referrer-Policy": "no-referrer",
  "X-Content-Type-Options": "nosniff",
};

self.addEventListener("install", (event) => {
  event.waitUntil((async () => {
    const cache = await caches.open(CACHE);
    // What an older version of the page had in use, this one will need offline, too.
    const used = await Promise.all(BUILD.later.map((file) => caches.match(file)));
    const files = [...BUILD.files, ...BUILD.later.filter((_, i) => used[i])];
    await cache.addAll(files.map((file) => new Request(file, { cache: "no-cache" })));
    await self.skipWaiting();
  })());
});

self.addEventListener("activate", (event) => {
  event.waitUntil((async () => {
    for (const name of await caches.keys()) if (name.startsWith("autosam3d ") && name !== CACHE) await caches.delete(name);
    await self.clients.claim();
  })());
});

self.addEventListener("fetch", (event) => {
  event.respondWith(answer(event.request));
});

async function answer(request) {
  const url = new URL(request.url);
  if (url.origin !== self.location.origin || request.method !== "GET") return Response.error();
  const cache = await caches.open(CACHE);
  const kept = await cache.match(request.mode === "navigate" ? "./" : request, { ignoreSearch: true });
  const response = kept ?? await fetch(request);
  if (response.status !== 200) return response;
  if (!kept && isLater(url)) await cache.put(request, response.clone());
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(response.body, { status: 200, headers });
}

function isLater({ pathname }) {
  return BUILD.later.some((file) => new URL(file, self.location).pathname === pathname);
}
