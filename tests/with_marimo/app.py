"""Views in a marimo notebook: live, as a cell's value, and as a still picture."""

import marimo

app = marimo.App()


@app.cell
def _():
    import marimo as mo

    from opdlab import viz

    lens = viz.TokenLens.example()
    return lens, mo


@app.cell
def _(lens, mo):
    live = mo.ui.anywidget(lens.live())
    live  # noqa: B018  # a cell shows its last value
    return (live,)


@app.cell
def _(live, mo):
    mo.md(f"selected: {live.value['selected']}")


@app.cell
def _(lens):
    lens  # noqa: B018


@app.cell
def _(lens, mo):
    mo.Html(lens.html(script=False))


if __name__ == "__main__":
    app.run()
