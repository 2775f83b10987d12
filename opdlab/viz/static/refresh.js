// Loads the page again every few seconds while its run goes on, at the place where the reader is.

const meta = document.querySelector('meta[name="opd-refresh"]');
const seconds = Number(meta?.getAttribute("content"));
const key = `opd-scroll ${location.pathname}`;

/** Storage may be switched off; the page then begins at its top. */
const stored = () => {
  try {
    return sessionStorage;
  } catch {
    return null;
  }
};

const place = Number(stored()?.getItem(key) ?? 0);
if (place > 0) scrollTo({ top: place, behavior: "instant" });
stored()?.removeItem(key);

setInterval(() => {
  const isReading = document.hidden || String(getSelection() ?? "") !== "";
  if (isReading) return; // nobody looks, or something is being selected
  stored()?.setItem(key, String(scrollY));
  location.reload();
}, 1000 * seconds);
