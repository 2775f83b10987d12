// Rules for the scripts of the pages (opdlab/viz/static), of the site, and their tests. Types are checked by tsc.
import js from "@eslint/js";

// Single letters that a reader knows: indices, coordinates, and the symbols of a printed equation.
const LETTERS = ["i", "j", "k", "n", "x", "y", "p", "q", "w", "z", "f", "a", "b", "_"];

const rules = {
  complexity: ["error", 12],
  "max-depth": ["error", 3],
  "max-lines-per-function": ["error", { max: 60, skipBlankLines: true, skipComments: true }],
  "id-length": ["error", { min: 2, exceptions: LETTERS, properties: "never" }],
  "no-shadow": "error",
  "no-var": "error",
  "prefer-const": "error",
  eqeqeq: "error",
  "no-nested-ternary": "error",
  "no-sequences": "error",
  "no-unused-expressions": "error",
  "no-void": "error",
  "one-var": ["error", "never"],
  "prefer-template": "error",
  "object-shorthand": "error",
  "no-eval": "error",
  "no-implied-eval": "error",
  "no-new-func": "error",
  // Foreign text enters a page as text, never as markup.
  "no-restricted-properties": [
    "error",
    ...["innerHTML", "outerHTML", "insertAdjacentHTML"].map((property) => ({ property })),
    { object: "document", property: "write" },
  ],
};

// What the scripts use of a browser, and the tests of node.
const BROWSER = [
  "atob",
  "cancelAnimationFrame",
  "clearInterval",
  "clearTimeout",
  "CustomEvent",
  "document",
  "DOMPoint",
  "Event",
  "EventTarget",
  "getComputedStyle",
  "getSelection",
  "HTMLElement",
  "location",
  "matchMedia",
  "MessageEvent",
  "Node",
  "Plotly",
  "requestAnimationFrame",
  "ResizeObserver",
  "scrollTo",
  "scrollY",
  "sessionStorage",
  "setInterval",
  "setTimeout",
  "structuredClone",
  "URL",
  "TextDecoder",
  "window",
  "Element",
  "Option",
];

export default [
  {
    ignores: [
      "**/*",
      "!opdlab/",
      "!opdlab/viz/",
      "!opdlab/viz/static/",
      "!opdlab/viz/static/*.js",
      "!website/",
      "!website/*.js",
      "!tests/",
      "!tests/javascript/",
      "!tests/javascript/*.js",
      "!eslint.config.js",
    ],
  },
  js.configs.recommended,
  {
    languageOptions: {
      ecmaVersion: 2023,
      sourceType: "module",
      globals: Object.fromEntries(BROWSER.map((name) => [name, "readonly"])),
    },
    rules,
  },
];
