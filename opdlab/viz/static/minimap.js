// The minimap: a long text at a glance. Where many tokens share a pixel the largest size is drawn,
// never a mean: peaks survive.

/** @import { Channel, Segments } from "./types.js" */
/** @import { Strip } from "./strip.js" */

import { clamp, css, hueOf, make, put, twoSided } from "./core.js";
import { strongest, TALL_STRIP } from "./strip.js";
import { barShare } from "./tracks.js";

const ROW = 22; // px of a row of the map

/**
 * Marks on the map: triangles at `peaks`, ticks at `found`; rows.
 * @typedef {{ first: number, size: number, peaks: number[], found: number[] }} MapRange
 */

// ── Values by pixel ──────────────────────────────────────────────────────────────────────────────

/** @param {ArrayLike<number>} values @param {number} from @param {number} to */
export const commonest = (values, from, to) => {
  /** @type {Map<number, number>} */
  const counts = new Map();
  for (let i = from; i < to; i++) {
    if (values[i] >= 0) counts.set(values[i], (counts.get(values[i]) ?? 0) + 1);
  }
  let best = -1;
  for (const [value, count] of counts) if (count > (counts.get(best) ?? 0)) best = value;
  return best;
};

/**
 * Return one value per pixel: of numbers the largest size, of categories the commonest.
 * @param {Channel} channel
 * @param {number} first
 * @param {number} size
 * @param {number} width
 */
export const poolPixels = (channel, first, size, width) =>
  Array.from({ length: width }, (_, x) => {
    const from = first + Math.floor((x * size) / width);
    const to = Math.max(from + 1, first + Math.floor(((x + 1) * size) / width));
    const pool = channel.kind === "category" ? commonest : strongest;
    return pool(channel.values, from, to);
  });

// ── Drawing ──────────────────────────────────────────────────────────────────────────────────────

/**
 * Draw one channel on its canvas.
 * @param {HTMLCanvasElement} canvas
 * @param {Channel} channel
 * @param {MapRange} range
 */
const drawMapRow = (canvas, channel, { first, size, peaks, found }) => {
  const density = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * density);
  const height = Math.round(ROW * density);
  const pen = canvas.getContext("2d");
  if (!width || !size || !pen) return;
  canvas.width = width;
  canvas.height = height;
  const top = Math.round(4 * density);
  const floor = height - Math.round(2 * density);
  const zero = twoSided(channel) ? (top + floor) / 2 : floor;
  poolPixels(channel, first, size, width).forEach((value, x) => {
    const share = barShare(value, channel);
    if (!(share > 0)) return;
    pen.fillStyle = css(hueOf(value, channel), 0.95);
    const tall = Math.max(density, share * (zero - top));
    pen.fillRect(x, value < 0 ? zero : zero - tall, 1, tall);
  });
  pen.fillStyle = getComputedStyle(canvas).color;
  pen.globalAlpha = 0.3;
  pen.fillRect(0, Math.round(zero), width, density);
  pen.globalAlpha = 1;
  const placeOf = (/** @type {number} */ row) => ((row - first + 0.5) / size) * width;
  for (const row of peaks) {
    const x = placeOf(row);
    pen.beginPath();
    pen.lineTo(x - 3 * density, 0);
    pen.lineTo(x + 3 * density, 0);
    pen.lineTo(x, 4 * density);
    pen.fill();
  }
  for (const row of found) {
    const x = Math.round(placeOf(row));
    pen.fillRect(x, height - 4 * density, Math.max(1, density), 4 * density);
  }
};

/**
 * Draw the bands of segments: two shades in turn by name, and the name itself where it fits.
 * @param {Segments} segments
 * @param {number} size
 */
const segmentBands = (segments, size) => {
  const node = make("div", "opd-map-bands");
  const names = [...new Set(segments.map(([name]) => name))];
  for (const [name, first, rows] of segments) {
    const band = make("span", names.indexOf(name) % 2 ? "opd-band opd-odd" : "opd-band", name);
    band.style.left = `${(100 * first) / size}%`;
    band.style.width = `${(100 * rows) / size}%`;
    band.title = name;
    node.append(band);
  }
  return node;
};

// ── Where the strip stands ───────────────────────────────────────────────────────────────────────

/**
 * Return the first number from low on that passes; the numbers that pass follow those that do not.
 * @param {number} low
 * @param {number} high
 * @param {(i: number) => boolean} passes
 */
export const firstThat = (low, high, passes) => {
  let [from, to] = [low, high];
  while (from < to) {
    const middle = (from + to) >> 1;
    if (passes(middle)) to = middle;
    else from = middle + 1;
  }
  return from;
};

/**
 * Return the first and last token of a strip that can be seen in its scrolling box. Only blocks in
 * sight are laid out, so the search goes through the blocks first.
 * @param {Strip} strip
 */
const inSight = ({ node, nodes, size }) => {
  const { top, bottom } = node.getBoundingClientRect();
  const blocks = [...node.querySelectorAll(":scope > .opd-block")];
  const indexOf = (/** @type {Element | undefined} */ token) =>
    Number(token?.getAttribute("data-i")) - Number(nodes[0].dataset.i);
  const isBelow = (/** @type {Element} */ part, /** @type {number} */ y) =>
    part.getBoundingClientRect().bottom > y;
  const tokenAt = (/** @type {number} */ y) => {
    let [low, high] = [0, size - 1];
    if (blocks.length) {
      const i = firstThat(0, blocks.length, (k) => isBelow(blocks[k], y));
      const inside = [...blocks[Math.min(blocks.length - 1, i)].querySelectorAll("[data-i]")];
      [low, high] = [indexOf(inside[0]), indexOf(inside.at(-1))];
    }
    return firstThat(low, high, (i) => isBelow(nodes[i], y));
  };
  return [tokenAt(top + 4), tokenAt(bottom - 8)];
};

/**
 * Scroll the strip, not the page, so that a token lies in the middle.
 * @param {Strip} strip
 * @param {number} i
 */
export const scrollStrip = ({ node, nodes }, i) => {
  // Twice, since blocks out of sight only guess their height.
  for (let pass = 0; pass < 2; pass++) {
    const box = node.getBoundingClientRect();
    const token = nodes[i].getBoundingClientRect();
    node.scrollTop += token.top - box.top - box.height / 2;
  }
};

/**
 * Dragging on the map and its keys scroll the strip.
 * @param {HTMLElement} area
 * @param {Strip} strip
 */
const listenToMap = (area, strip) => {
  const goTo = (/** @type {PointerEvent} */ event) => {
    const box = area.getBoundingClientRect();
    const i = Math.floor(((event.clientX - box.left) / box.width) * strip.size);
    scrollStrip(strip, clamp(i, 0, strip.size - 1));
  };
  area.addEventListener("pointerdown", (event) => {
    area.setPointerCapture(event.pointerId);
    goTo(event);
  });
  area.addEventListener("pointermove", (event) => {
    if (area.hasPointerCapture(event.pointerId)) goTo(event);
  });
  area.addEventListener("keydown", (event) => {
    const page = 0.9 * strip.node.clientHeight;
    /** @type {Record<string, number>} */
    const distances = {
      ArrowRight: page / 3,
      ArrowLeft: -page / 3,
      PageDown: page,
      PageUp: -page,
      Home: -1e9,
      End: 1e9,
    };
    const distance = distances[event.key];
    if (distance === undefined) return;
    event.preventDefault();
    strip.node.scrollTop += distance;
  });
};

// The frame around the part of the text in sight, and the line at the chosen token.
/** @param {HTMLElement} area @param {Strip} strip @param {Segments} segments */
const mapMarks = (area, strip, segments) => {
  const { first, size } = strip;
  const frame = make("div", "opd-frame");
  const here = make("div", "opd-here");
  const followScroll = () => {
    const [from, to] = inSight(strip);
    frame.style.left = `${(100 * from) / size}%`;
    frame.style.width = `${(100 * Math.max(1, to - from + 1)) / size}%`;
    const within = segments.filter(([, start, rows]) => start <= to && start + rows > from);
    const names = new Set(within.map(([name]) => name));
    const words = [`tokens ${from} to ${to} of ${size}`, ...names].join(", ");
    put(area, { "aria-valuenow": from, "aria-valuetext": words });
  };
  /** @param {number} row */
  const mark = (row) => {
    here.hidden = row < first || row >= first + size;
    here.style.left = `${(100 * (row - first + 0.5)) / size}%`;
  };
  let waiting = 0;
  strip.node.addEventListener("scroll", () => {
    waiting ||= requestAnimationFrame(() => {
      waiting = 0;
      followScroll();
    });
  });
  return { nodes: [frame, here], followScroll, mark };
};

/**
 * Make the map of a strip: a row per channel under the bands of segments.
 * @param {Strip} strip
 * @param {Segments} segments
 */
export const miniMap = (strip, segments) => {
  const { first, size } = strip;
  const node = make("div", "opd-map");
  const names = make("div", "opd-map-names");
  const rows = put(make("div", "opd-map-rows"), {
    role: "slider",
    tabindex: "0",
    "aria-label": "Overview: which part of the text is in sight",
    "aria-valuemin": "0",
    "aria-valuemax": String(size - 1),
  });
  node.append(names, rows);
  const marks = mapMarks(rows, strip, segments);
  /** @type {{ canvas: HTMLCanvasElement, channel: Channel }[]} */
  let drawn = [];
  let shown = {
    peaks: /** @type {number[]} */ ([]),
    found: /** @type {number[]} */ ([]),
    chosen: -1,
  };
  const paint = () => {
    drawn.forEach(({ canvas, channel }, i) => {
      const { peaks, found } = i ? { peaks: [], found: [] } : shown; // of the first channel only
      drawMapRow(canvas, channel, { first, size, peaks, found });
    });
    marks.mark(shown.chosen);
    marks.followScroll();
  };
  /** @param {Channel[]} channels @param {typeof shown} show */
  const draw = (channels, show) => {
    shown = show;
    drawn = channels.map((channel) => ({ canvas: make("canvas", "opd-map-row"), channel }));
    names.replaceChildren(...channels.map(({ label }) => make("div", "opd-map-name", label)));
    rows.replaceChildren(...drawn.map(({ canvas }) => canvas), ...marks.nodes);
    if (segments.length) {
      names.prepend(make("div", "opd-map-name opd-map-segment", "segment"));
      rows.prepend(segmentBands(segments, size));
    }
    paint();
  };
  listenToMap(rows, strip);
  const watcher = new ResizeObserver(paint);
  watcher.observe(rows);
  return { node, draw, mark: marks.mark, close: () => watcher.disconnect() };
};

/**
 * Make a strip scroll in its own box if its text is long, with a map of it; null for short texts.
 * @param {Strip} strip
 * @param {Segments} segments
 */
export const mapOfLong = (strip, segments) => {
  const isLong = strip.size > TALL_STRIP;
  strip.node.classList.toggle("opd-tall", isLong);
  return isLong ? miniMap(strip, segments) : null;
};
