// Tracks: further channels as thin bars under each line of a strip, as genome browsers draw them. The height says the size, above
// or below the middle the sign, and of kinds the step which it is: the colour only repeats it.

import { css, hueOf, isNamed, make, number, put, twoSided, weightOf } from "./core.js";
import { shownOf } from "./strip.js";

const LANE = 10; // px of a track, as in opd.css
export const MOST_TRACKS = 4;

// [height, distance from the lane's floor], px.
const barOf = (value, channel) => {
  const room = LANE - 2;
  const share =
    channel.kind === "category" ? (value + 1) / channel.names.length : weightOf(value, channel);
  if (!(share > 0)) return [0, 0];
  const height = Math.max(1, share * (twoSided(channel) ? room / 2 : room));
  return [height, twoSided(channel) ? (value > 0 ? room / 2 : room / 2 - height) : 0];
};

export const paintTracks = (strip, channels) => {
  const { node, glyphs, first } = strip;
  node.toggleAttribute("data-tracks", channels.length > 0);
  node.style.setProperty("--lanes", channels.length);
  for (const { ink, first: from, size } of glyphs) {
    let style = "";
    channels.forEach((channel, lane) => {
      const value = shownOf(channel, first + from, first + from + size);
      const [height, floor] = barOf(value, channel);
      if (!height) return;
      const low = (channels.length - 1 - lane) * LANE + 1 + floor;
      style += `--c${lane}:${css(hueOf(value, channel), 0.9)};--h${lane}:${height.toFixed(1)}px;--y${lane}:${low.toFixed(1)}px;`;
    });
    if (ink.style.cssText || style) ink.style.cssText = style;
  }
};

// The names of the tracks from top to bottom, with their ranges, each a button that takes its track away.
export const trackNames = (channels, remove) =>
  channels.map((channel) => {
    const ends = isNamed(channel)
      ? channel.names
          .map((name, i) => `${channel.marks[i]}${i ? "" : " lowest"}`)
          .slice(0, 1)
          .join("")
      : `${twoSided(channel) ? "±" : "0 to "}${number(channel.limit)}${channel.unit ? ` ${channel.unit}` : ""}`;
    const button = put(make("button", "opd-button opd-track-name"), {
      type: "button",
      "aria-label": `Take away the track ${channel.label}`,
    });
    button.append(make("b", "", channel.label), make("span", "", ends), make("span", "", "×"));
    button.addEventListener("click", () => remove(channel.key));
    return button;
  });
