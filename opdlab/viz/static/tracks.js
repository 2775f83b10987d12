// Tracks: further channels as thin bars under each line of a strip, as genome browsers draw them.
// The height says the size, above or below the middle the sign, and of categories the step which
// one it is: the colour only repeats it.

/** @import { Channel } from "./types.js" */
/** @import { Strip } from "./strip.js" */

import { css, hueOf, isNamed, make, makeButton, number, put, twoSided, weightOf } from "./core.js";
import { shownOf } from "./strip.js";

const LANE = 10; // px of a track, as in opd.css
export const MOST_TRACKS = 4;

/**
 * Return the share of its room that a value's bar fills; NaN or 0 for none.
 * @param {number} value
 * @param {Channel} channel
 */
export const barShare = (value, channel) =>
  channel.kind === "category"
    ? (value + 1) / (channel.names ?? []).length
    : weightOf(value, channel);

/**
 * Return the height of a value's bar and its distance from the lane's floor, px.
 * @param {number} value
 * @param {Channel} channel
 * @returns {[height: number, floor: number]}
 */
export const barOf = (value, channel) => {
  const room = LANE - 2;
  const share = barShare(value, channel);
  if (!(share > 0)) return [0, 0];
  if (!twoSided(channel)) return [Math.max(1, share * room), 0];
  const height = Math.max(1, (share * room) / 2);
  return [height, value > 0 ? room / 2 : room / 2 - height];
};

/**
 * Draw bars under every glyph of a strip, a lane per channel. The bars are custom properties of the
 * glyph: `--c` colour, `--h` height, `--y` floor of each lane.
 * @param {Strip} strip
 * @param {Channel[]} channels
 */
export const paintTracks = ({ node, glyphs, first }, channels) => {
  node.toggleAttribute("data-tracks", channels.length > 0);
  node.style.setProperty("--lanes", String(channels.length));
  for (const { ink, first: from, size } of glyphs) {
    let style = "";
    channels.forEach((channel, lane) => {
      const value = shownOf(channel, first + from, first + from + size);
      const [height, floor] = barOf(value, channel);
      if (!height) return;
      const low = (channels.length - 1 - lane) * LANE + 1 + floor;
      const colour = css(hueOf(value, channel), 0.9);
      style += `--c${lane}:${colour};--h${lane}:${height.toFixed(1)}px;--y${lane}:${low.toFixed(1)}px;`;
    });
    if (ink.style.cssText || style) ink.style.cssText = style;
  }
};

/** @param {Channel} channel */
const rangeOf = (channel) => {
  if (isNamed(channel)) return `${channel.marks?.[0] ?? ""} lowest`;
  const unit = channel.unit ? ` ${channel.unit}` : "";
  return `${twoSided(channel) ? "±" : "0 to "}${number(channel.limit)}${unit}`;
};

/**
 * Return the names of the tracks from top to bottom, with their ranges, each a button that takes
 * its track away.
 * @param {Channel[]} channels
 * @param {(key: string) => void} remove
 */
export const trackNames = (channels, remove) =>
  channels.map((channel) => {
    const node = makeButton("opd-track-name");
    put(node, { "aria-label": `Take away the track ${channel.label}` });
    node.append(make("b", "", channel.label));
    node.append(make("span", "", rangeOf(channel)), make("span", "", "×"));
    node.addEventListener("click", () => remove(channel.key));
    return node;
  });

/**
 * Return the key of the lanes under a strip: their numbers and names.
 * @param {string} words
 * @param {Channel[]} channels
 */
export const laneKey = (words, channels) => {
  const node = make("div", "opd-lanes opd-soft");
  node.append(make("span", "", words));
  channels.forEach((channel, i) => {
    const item = make("span", "opd-lane-name");
    item.append(make("b", "", `${i + 1} ${channel.label}`));
    item.title = channel.formula ?? "";
    node.append(item);
  });
  return node;
};
