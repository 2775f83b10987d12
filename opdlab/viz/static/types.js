// The types of everything that Python sends to a page, and of the objects that the scripts share. There is no code here: other
// files name these types in JSDoc, and the page that a reader opens does not carry this file.

/**
 * Numbers of a payload. `payload.js` makes them typed arrays; integers arrive as integer arrays, which read the same.
 * @typedef {Float32Array} Numbers
 *
 * A token as the strip draws it: its text, or [leading spaces, [[what is seen, raw text], …], 1 for a special token].
 * @typedef {string | [lead: string, parts: [seen: string, raw: string][], special: number]} Glyph
 *
 * One completion: its rows are first … first + size - 1. `key` is equal for the same completion in all views.
 * @typedef {{ key: string, sample: number, first: number, size: number, prompt: string, finish: string }} Completion
 *
 * Tokens of a trace (`payload.text`). Row i is vocabulary entry `index[i]`, with `id`, `word` (null: as the glyph) and `glyph`.
 * `joined` lists [row, tokens, glyph] of tokens that are one glyph together.
 * @typedef {object} Text
 * @property {Numbers} index
 * @property {Numbers} id
 * @property {(string | null)[]} word
 * @property {Glyph[]} glyph
 * @property {[row: number, size: number, glyph: Glyph][]} joined
 * @property {[row: number, size: number, turn: number, isOwn: boolean][]} [turns] of conversations: the student's turns, and what was said between them
 * @property {Completion[]} texts
 *
 * Rows that share one glyph.
 * @typedef {{ first: number, size: number, glyph: Glyph }} Group
 */

/**
 * How values become colours. Kinds: "ratio" and "signed" have two sides, "amount" one, "category" and "ordinal" are names.
 * @typedef {object} Scale
 * @property {string} kind
 * @property {number} limit value of full colour
 * @property {string[]} [names] of categories
 * @property {string[]} [marks] a letter for each category
 * @property {string[]} [hues] the policy or colour of each category, where it has one
 *
 * Categories of every token, which a view tells beside its own numbers.
 * @typedef {Scale & { label: string, values: Numbers }} Kind
 *
 * The words of a channel, for its button, legend and read-outs.
 * @typedef {object} Words
 * @property {string} key
 * @property {string} label
 * @property {string} unit
 * @property {string} less the low end in words
 * @property {string} more the high end in words
 * @property {string} [against] the policy that the student is compared with
 * @property {string} [formula]
 * @property {boolean} [minor] waits behind "more"
 *
 * One value per row with its words (`channels.described`); `peaks` are the rows of largest size.
 * @typedef {Scale & Words & { values: Numbers, peaks: number[] }} Channel
 *
 * One value per row for each of several traces.
 * @typedef {Scale & Words & { values: Numbers[], peaks: number[][], rho: Numbers }} ComparedChannel
 *
 * One value per row and step, step after step. `delta` describes the change since the first step.
 * @typedef {Scale & Words & { values: Numbers, peaks: number[][], delta: Delta }} SteppedChannel
 * @typedef {{ near: boolean, kind: string, limit: number, less: string, more: string, peaks: number[][] }} Delta
 */

/**
 * Lines over steps (`lines.Plot.data`): `x` and `y` are the ends of the axes, `marks` flags at steps.
 * @typedef {object} Plot
 * @property {string} [key]
 * @property {string} label
 * @property {string} [unit]
 * @property {string} told words beside the label
 * @property {number[]} x
 * @property {number[]} y
 * @property {[x: number, sign: string][]} marks
 * @property {Line[]} lines
 *
 * @typedef {{ name: string, look: string, kind: string, x: ArrayLike<number>, y: ArrayLike<number> }} Line
 *
 * Candidate tokens of every policy (`duel.duel`). `count` rows belong to each token; `row` points into `ids` and `names`.
 * `p` is the probability of each row, `other` of all that is not listed, `rank` of the sampled token.
 * @typedef {object} Duel
 * @property {Numbers} count
 * @property {Numbers} row
 * @property {Numbers} ids
 * @property {string[]} names
 * @property {Record<string, Numbers>} p
 * @property {Record<string, Numbers>} other
 * @property {Record<string, Numbers>} rank
 * @property {Record<string, Numbers>} [beside] further numbers of each row
 * @property {Record<string, Numbers>} [beside_other] and of all that is not listed
 *
 * Named parts of a text: [name, first row, rows].
 * @typedef {[name: string, first: number, size: number][]} Segments
 */

// ── The payload of each view, as its `data()` in Python makes it ─────────────────────────────────────────────────

/**
 * @typedef {object} LensPayload
 * @property {string} title
 * @property {string} prompt
 * @property {string} finish
 * @property {string[]} policies
 * @property {Text} text
 * @property {Duel | null} duel
 * @property {Channel[]} channels
 * @property {string[]} left channels that the page has no room for
 * @property {Segments} segments
 *
 * A part of a formula (`opdlab.data.formula`): ["name", name], ["number", value], or a sign or function with its arguments.
 * @typedef {[kind: string, ...rest: any[]]} FormulaPart
 *
 * @typedef {object} EquationPayload
 * @property {string} title
 * @property {string} prompt
 * @property {string} finish
 * @property {string[]} policies
 * @property {Text} text
 * @property {Duel | null} duel
 * @property {string} method
 * @property {string} formula
 * @property {FormulaPart} tree empty where there is no formula
 * @property {Numbers} values of the formula, per row
 * @property {Channel[]} channels
 * @property {string} shown key of the channel that colours
 *
 * Places where the student wrote one token and the teacher wanted the other; `share` is of the payload's amount.
 * @typedef {object} DisagreementGroup
 * @property {string} before tokens that stand before all of them
 * @property {string} student
 * @property {string} teacher
 * @property {number} count
 * @property {number} completions
 * @property {number} preference in nats
 * @property {number} share
 *
 * @typedef {object} DisagreementsPayload
 * @property {string} title
 * @property {Text} text
 * @property {string} teacher
 * @property {string} amount
 * @property {DisagreementGroup[]} groups
 * @property {number} left groups that the page has no room for
 * @property {number} places
 * @property {Numbers} row of all places, group after group
 *
 * @typedef {object} Axis
 * @property {string} key
 * @property {string} label
 * @property {string} unit
 * @property {"linear" | "log" | "asinh"} scale
 * @property {number} soft where asinh turns from linear to logarithmic
 * @property {number} start of the line to drag
 * @property {[low: number, high: number]} ends
 * @property {string} less
 * @property {string} more
 * @property {Numbers} values
 *
 * A rule on tokens: a number with a threshold, or a name.
 * @typedef {{ key: string, sign: string, value: number | string }} Rule
 *
 * @typedef {object} RulesPayload
 * @property {string} title
 * @property {string} prompt
 * @property {string} finish
 * @property {Text} text of all completions
 * @property {number} first row of the completion that is drawn
 * @property {number} size
 * @property {Axis[]} axes
 * @property {{ key: string, label: string, names: string[], values: Numbers }[]} kinds
 * @property {Numbers} own 1 for tokens that the student wrote
 * @property {Record<string, Numbers>} amounts
 *
 * A label on tokens of a completion (`opdlab.data.labels.Mark`).
 * @typedef {{ sample: number, position: number, length: number, label: string, comment: string }} Mark
 *
 * @typedef {object} MarksPayload
 * @property {string} title
 * @property {string} prompt
 * @property {string} finish
 * @property {Text} text
 * @property {number} sample
 * @property {boolean} is_kept whether Python has a file for them
 * @property {{ format: number, tokens: string }} file what a file of labels begins with
 * @property {[label: number, comment: number]} longest characters
 *
 * Trees at tokens (`opdlab.data.branches`): branches, and the texts that policies wrote on from them.
 * @typedef {{ text: string, kl: number | null, score: number | null, finish: string }} GrownText
 * @typedef {{ name: string, score: number | null, kl: number | null, texts: GrownText[] }} GrownWriter
 * @typedef {{ token: string, by: string, p: Record<string, number>, writers: GrownWriter[] }} GrownBranch
 * @typedef {{ row: number, branches: GrownBranch[] }} GrownTree
 * @typedef {{ title: string, prompt: string, finish: string, text: Text, channel: Channel, asks: boolean, trees: GrownTree[] }} BranchesPayload
 *
 * What a policy read before a token, weighed (`opdlab.data.reasons.Reading`).
 * @typedef {object} WeighedSide
 * @property {string} name
 * @property {number} logp
 * @property {number} limit weight of full colour
 * @property {string[]} pieces
 * @property {string[]} parts
 * @property {number[]} weights
 * @property {Record<string, number>} shares
 * @property {number[]} largest places of the largest weights
 *
 * @typedef {{ row: number, token: string, sides: WeighedSide[], depth: Plot | null }} ReasonAt
 * @typedef {{ title: string, prompt: string, finish: string, text: Text, channel: Channel, asks: boolean, reasons: ReasonAt[] }} WhyPayload
 *
 * @typedef {{ key: string, names: string[], hues: string[], index: Numbers }} Sort
 * @typedef {{ title: string, text: Text, axes: Axis[], sorts: Sort[], amounts: Record<string, Numbers> }} RegimesPayload
 *
 * Windows that student and teacher wrote from the same prefix, and the transport plan between them. `asked`: made live.
 * @typedef {object} ForkWindow
 * @property {number} row
 * @property {string[]} student
 * @property {string[]} teacher
 * @property {number} distance
 * @property {boolean} [asked]
 * @property {boolean[][]} same
 * @property {number[][] | null} plan
 *
 * @typedef {{ title: string, text: Text, channel: Channel, asks: boolean, windows: ForkWindow[], size: number }} ForksPayload
 *
 * @typedef {{ glyph: Glyph, similarity: number, count: number }} Answer
 * @typedef {object} Audit
 * @property {number} row
 * @property {number} length
 * @property {number} weight
 * @property {number} prior
 * @property {number} similarity
 * @property {number} n texts of the teacher
 * @property {Glyph} glyph what the student wrote
 * @property {Answer[]} answers
 *
 * @typedef {object} AuditsPayload
 * @property {string} title
 * @property {Text} text
 * @property {Channel[]} channels entropy, then the lanes under the text
 * @property {number | null} alpha
 * @property {Numbers} audit row of the audit that a token lies in, -1 for none
 * @property {Audit[]} audits
 *
 * @typedef {"student" | "plain" | "informed" | "wrong"} Side
 * @typedef {{ information: Numbers, capability: Numbers, entropy: Numbers }} Split
 * @typedef {Split & { gap: Numbers, wrong?: Numbers, type: Numbers, names: string[] }} Everywhere
 * @typedef {object} PrivilegePayload
 * @property {string} title
 * @property {string} prompt
 * @property {string} finish
 * @property {Record<string, string>} sides name of the policy on each side
 * @property {Text} text
 * @property {Channel[]} channels
 * @property {Record<string, Numbers>} logp by side
 * @property {Record<string, Numbers>} entropy by side
 * @property {number} least nats that count
 * @property {Everywhere} all every completion of the trace
 * @property {number} start of this completion in `all`
 * @property {Segments} segments
 *
 * @typedef {object} ComparePayload
 * @property {string} title
 * @property {Text} text
 * @property {string[]} names
 * @property {string} prompt
 * @property {ComparedChannel[]} channels
 * @property {(Scale & { label: string, values: Numbers[] })[]} kinds with values for each trace
 *
 * Probabilities of the sampled token at every step and, in `wanted`, the likeliest token; both are flat, step after step.
 * @typedef {object} Fate
 * @property {string | null} rival
 * @property {Record<string, Numbers>} p in 255ths
 * @property {{ names: string[], at: Record<string, Numbers> } | null} wanted
 *
 * @typedef {[kind: "same" | "gone" | "new", words: string][]} Difference
 * @typedef {object} ScrubberPayload
 * @property {string} title
 * @property {string} prompt
 * @property {string[]} finish
 * @property {boolean} probe one text at all steps, not a text per step
 * @property {number[]} steps
 * @property {Text} text
 * @property {number[]} sizes
 * @property {SteppedChannel[]} channels
 * @property {Kind[]} kinds with the values of all steps
 * @property {Plot[]} facts
 * @property {Fate | null} fate
 * @property {{ previous: Difference[], first: Difference[] } | null} words
 *
 * The rows and sums of a student's turn.
 * @typedef {{ first: number, size: number, turn: number, tokens: number, log_ratio?: number, kl?: number }} Turn
 * @typedef {object} TimelinePayload
 * @property {string} title
 * @property {string} against
 * @property {Text} text
 * @property {Record<string, Numbers>} paths
 * @property {number} limit
 * @property {Kind[]} kinds
 * @property {string[]} looks of each rollout's line
 * @property {Plot[]} own a plot for each rollout, where there are many
 * @property {Plot[]} plots of all rollouts
 * @property {[label: string, told: string]} head
 * @property {number[] | null} rewards
 * @property {Turn[]} turns of conversations
 *
 * @typedef {object} RolloutTable
 * @property {Numbers} sample
 * @property {Numbers} prompt index into `prompts`
 * @property {string[]} end last words
 * @property {string[]} finish
 * @property {Numbers} [tokens]
 * @property {Numbers} [turns] of conversations
 * @property {Numbers} [reward]
 * @property {Numbers} [reverse_kl]
 * @property {Numbers} [log_ratio]
 * @property {Numbers} [peak]
 *
 * @typedef {Scale & { bins: Numbers }} Spark
 * @typedef {object} RolloutsPayload
 * @property {string} title
 * @property {Text} text
 * @property {Channel[]} channels
 * @property {RolloutTable} table
 * @property {string[]} prompts
 * @property {string} by_turn mean sums of each turn, in words; "" without turns
 * @property {Spark} spark
 *
 * @typedef {{ k: number[], student_mass: number[], rival_mass: number[], bucket: number[], exact: number[], read: number[] }} TailCurve
 * A knob, an arm, a metric or a budget of a map.
 * @typedef {{ name: string, label: string, description: string }} NamedOne
 *
 * `settings` are those of each knob. Numbers run over metrics, budgets, settings of the knobs that are no axis, and cells;
 * differences over `pairs` before, own scores over arms.
 * @typedef {object} MapPayload
 * @property {string} title
 * @property {string} premise
 * @property {NamedOne[]} knobs
 * @property {NamedOne[]} arms
 * @property {NamedOne[]} metrics
 * @property {NamedOne[]} budgets
 * @property {string[][]} settings
 * @property {[arm: string, against: string][]} pairs
 * @property {number[]} limits difference of full colour of each metric
 * @property {number} seeds
 * @property {Numbers} mean
 * @property {Numbers} low
 * @property {Numbers} high
 * @property {Numbers} side 1, 0 or -1
 * @property {Numbers} own
 * @property {Numbers} half
 *
 * @typedef {object} TailPayload
 * @property {string} title
 * @property {string} finish
 * @property {Text} text
 * @property {number[]} ks
 * @property {TailCurve} curve
 * @property {string} by the policy whose top k are scored
 * @property {string} against
 * @property {Plot[]} plots
 * @property {number} limit
 * @property {Numbers} exact KL per row
 * @property {Numbers} missed flat, k after k
 * @property {Numbers} student percent covered, flat
 * @property {Numbers} rival percent covered, flat
 *
 * @typedef {[sign: string, run: string, step: number, signature: string, sentence: string, remedy: string]} Alarm
 * A rollout of a kept step; `first` is -1 where the page has no room for its tokens.
 * @typedef {object} KeptRollout
 * @property {string} prompt
 * @property {string} end last words
 * @property {string} finish
 * @property {number} tokens
 * @property {number | null} reward
 * @property {number | null} kl
 * @property {number} first row in the payload's text
 * @property {number} size
 *
 * @typedef {object} BoardPayload
 * @property {string} title
 * @property {string} said
 * @property {string[]} runs
 * @property {Record<string, string>} hues
 * @property {Plot[]} plots
 * @property {[string, number, number][]} [phases] words, share of the step, and the limit's share of the bar
 * @property {Alarm[]} alarms
 * @property {Text} [text] tokens of kept rollouts
 * @property {Channel | null} [channel] that colours them
 * @property {{ step: number, rollouts: KeptRollout[] }[]} [kept]
 *
 * @typedef {{ word: string[], at: Numbers, wide: Numbers, size: Numbers }} AlignedTokens
 * @typedef {object} AlignmentPayload
 * @property {string} title
 * @property {[string, string]} names
 * @property {string} said
 * @property {AlignedTokens} ours
 * @property {AlignedTokens} theirs
 * @property {Numbers} cuts six numbers per span: ours from, to; theirs from, to; bytes; 1 where both spell the same
 * @property {Numbers | null} kl
 * @property {number} limit
 * @property {number} long characters from which joints are not drawn
 * @property {number} full tokens that a cell shows
 *
 * @typedef {{ mass: number, temperature: number, steps: number, teacher: number[], student: number[] }} WorldSettings
 * @typedef {object} OwnLoss
 * @property {string} name
 * @property {boolean} mine whether it is the user's, and not one of opdlab's table
 * @property {(number | null)[]} weights
 * @property {(number | null)[]} pulls
 * @property {number[]} field
 * @property {number[]} walk
 * @property {[centre: number, width: number]} fit
 *
 * @typedef {object} LossCard
 * @property {string} name
 * @property {string} verdict
 * @property {[flag: string, said: string][]} flags
 * @property {string} check
 * @property {boolean} held
 * @property {[divergence: string, target: string, cosine: number, ratio: number][]} rows
 *
 * @typedef {object} PlaygroundPayload
 * @property {string} title
 * @property {string[]} hues
 * @property {number} tall
 * @property {number} alone
 * @property {[name: string, parameter: string][]} known
 * @property {OwnLoss[]} own
 * @property {LossCard[]} cards
 * @property {WorldSettings} settings
 * @property {Text} [text]
 * @property {Duel | null} [duel]
 * @property {string[]} [policies]
 */

/**
 * @typedef {object} Payloads
 * @property {LensPayload} lens
 * @property {EquationPayload} equation
 * @property {DisagreementsPayload} disagreements
 * @property {RulesPayload} rules
 * @property {MarksPayload} marks
 * @property {BranchesPayload} branches
 * @property {WhyPayload} why
 * @property {RegimesPayload} regimes
 * @property {ForksPayload} forks
 * @property {AuditsPayload} audits
 * @property {PrivilegePayload} privilege
 * @property {ComparePayload} compare
 * @property {ScrubberPayload} scrubber
 * @property {TimelinePayload} timeline
 * @property {RolloutsPayload} rollouts
 * @property {TailPayload} tail
 * @property {MapPayload} map
 * @property {BoardPayload} board
 * @property {AlignmentPayload} alignment
 * @property {PlaygroundPayload} playground
 */

// ── State: what a page shares with Python and with other views ───────────────────────────────────────────────────

/**
 * The traits of all views. Rows are rows of the payload; -1 and [] stand for none.
 * @typedef {object} Traits
 * @property {number} selected
 * @property {number} hovered
 * @property {number[]} brush
 * @property {string} channel
 * @property {string[]} tracks
 * @property {number[]} pins
 * @property {number[]} pair
 * @property {number} threshold
 * @property {string} x
 * @property {string} y
 * @property {string} by
 * @property {Record<string, number>} thresholds
 * @property {string[]} hidden
 * @property {number[]} region
 * @property {number} undecided
 * @property {number} group
 * @property {Rule} a
 * @property {Rule} b
 * @property {Mark[]} marks
 * @property {number} rollout
 * @property {string} sort
 * @property {number} step
 * @property {boolean} delta
 * @property {string} against
 * @property {number} k
 * @property {string[]} shown
 * @property {number} parameter
 * @property {number} clip
 * @property {number} temperature
 * @property {number} steps
 * @property {number} mass
 * @property {number[]} teacher
 * @property {number[]} student
 * @property {string} arm
 * @property {string} metric
 * @property {string} budget
 * @property {number[]} at
 *
 * The part of the state that a token strip needs.
 * @typedef {object} StripState
 * @property {<Name extends keyof Traits>(name: Name) => Traits[Name]} get
 * @property {<Name extends keyof Traits>(name: Name, value: Traits[Name]) => void} set
 * @property {<Name extends keyof Traits>(name: Name, act: (value: Traits[Name]) => unknown) => void} on
 *
 * `ask` sends a question to Python and waits for the answer; only a live page may.
 * @typedef {StripState & { live: boolean, ask: (question: unknown) => Promise<any>, close: () => void }} State
 *
 * The model of anywidget, or its stand-in in a page without kernel. Values of traits are of any type.
 * @typedef {object} Model
 * @property {(name: string) => any} get
 * @property {(name: string, value: unknown) => void} set
 * @property {(name: string, act: (message: any) => void) => void} on
 * @property {(name: string, act: (message: any) => void) => void} off
 * @property {() => void} save_changes
 * @property {(message: unknown) => void} [send]
 */

/**
 * A view: draws into the empty node `box` and may return a function that undoes what lies outside of it (observers, timers).
 * @template Payload
 * @typedef {(stage: { box: HTMLElement, data: Payload, state: State }) => (() => void) | void} Draw
 */

export {};
