// The button with which a live page asks Python about the chosen token.

/** @import { State } from "./types.js" */

import { make, makeButton, put } from "./core.js";

/**
 * A line with a button; it says what is being done, and why nothing came of it.
 * @template Answer
 * @param {State} state
 * @param {{ name: string, words: string, meanwhile: string }} button its class, its words, and the
 *   words while Python works
 * @param {(answer: Answer) => void} add takes the answer
 */
export const askingLine = (state, { name, words, meanwhile }, add) => {
  const node = make("div", "opd-asking");
  const button = makeButton(name, words);
  const told = put(make("span", "opd-soft"), { role: "status" });
  button.addEventListener("click", async () => {
    button.disabled = true;
    told.textContent = meanwhile;
    try {
      add(await state.ask({ row: state.get("selected") }));
      told.textContent = "";
    } catch (error) {
      told.textContent = error instanceof Error ? error.message : String(error);
    }
    button.disabled = false;
  });
  node.append(button, told);
  return node;
};
