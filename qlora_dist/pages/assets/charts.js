// Draws the data block of a page with uPlot: one chart for each value, runs laid over each other.
(() => {
  "use strict";
  const { runs, charts } = JSON.parse(document.getElementById("data").textContent);
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const ofRun = (i) => color(`--c${i % 8}`);
  const large = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 });
  const format = (v) =>
    v == null ? "–" : v === 0 ? "0" : Math.abs(v) >= 10000 ? large.format(v)
      : Math.abs(v) < 0.001 ? v.toExponential(1).replace("e-", "e\u2212") : String(Number(v.toPrecision(5)));
  const several = runs.length > 1;
  const xs = {
    step: { label: "step", value: (v) => (v == null ? "–" : Math.round(v).toLocaleString("en")) },
    tokens: { label: "tokens", value: (v) => (v == null ? "–" : large.format(v)) },
    seconds: { label: "hours in steps", value: (v) => (v == null ? "–" : (v / 3600).toPrecision(3)) },
  };
  const drawn = [];

  // series of one chart: each is {table: [x, y...], options of its ys}
  function tables(chart, axis) {
    const found = [];
    runs.forEach((run, i) => {
      const values = run.steps[chart.key];
      const x = run.steps[axis];
      if (values) {
        const label = several ? run.name : chart.title.toLowerCase();
        const line = { label, width: run.line || 1.5, dash: run.dash || undefined, stroke: () => ofRun(i), points: { show: x.length < 2 } };
        if (values.low) {
          const edge = { label: "", class: "edge", width: 0, points: { show: false } };
          found.push({ run: i, table: [x, values.mean, values.low, values.high], options: [line, { ...edge }, { ...edge }], band: true });
        } else found.push({ run: i, table: [x, values.mean], options: [line] });
      }
      const held = chart.key === "loss" && run.held_out.eval_loss;
      if (held) {
        const label = several ? `${run.name}, held-out` : "held-out loss";
        const stroke = several ? () => ofRun(i) : () => ofRun(1);
        found.push({
          run: i, table: [run.held_out[axis], held.mean],
          options: [{ label, stroke, width: 1.5, dash: [6, 4], points: { show: true, size: 6, fill: stroke, stroke } }],
        });
      }
      const planned = run.planned && run.planned[chart.key];
      if (planned && values) {
        const label = several ? `${run.name}, planned` : "planned";
        found.push({
          run: i, table: [x, x.map(() => planned)],
          options: [{ label, stroke: () => color("--quiet"), width: 1, dash: [2, 4], points: { show: false } }],
        });
      }
    });
    return found;
  }

  function restartLines(u, axis) {
    if (axis !== "step") return;
    u.ctx.save();
    u.ctx.setLineDash([3, 3]);
    u.ctx.lineWidth = devicePixelRatio;
    runs.forEach((run, i) => {
      u.ctx.strokeStyle = several ? ofRun(i) : color("--quiet");
      for (const step of run.restarts) {
        if (step < u.scales.x.min || step > u.scales.x.max) continue;
        const x = Math.round(u.valToPos(step, "x", true));
        u.ctx.beginPath();
        u.ctx.moveTo(x, u.bbox.top);
        u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
        u.ctx.stroke();
      }
    });
    u.ctx.restore();
  }

  function draw(chart, holder, axis) {
    const found = tables(chart, axis);
    const series = [{ label: xs[axis].label, value: (_, v) => xs[axis].value(v) }];
    const bands = [];
    const edges = {}; // index of a mean -> indices of its lowest and highest
    for (const { options, band, run } of found) {
      const first = series.length;
      series.push(...options.map((one) => ({ value: (_, v) => format(v), ...one })));
      if (band) {
        bands.push({ series: [first + 2, first + 1], fill: () => ofRun(run) + "38" });
        edges[first] = [first + 1, first + 2];
      }
    }
    const line = { stroke: () => color("--quiet"), grid: { stroke: () => color("--line"), width: 1 }, ticks: { show: false } };
    const height = holder.clientWidth > 600 ? 280 : 210;
    const u = new uPlot({
      width: holder.clientWidth, height, series, bands,
      scales: { x: { time: false } },
      axes: [
        { ...line, space: 70, size: 32, values: (_, ticks) => ticks.map((v) => (axis === "step" ? large.format(v) : xs[axis].value(v))) },
        { ...line, size: 58, values: (_, ticks) => ticks.map(format) },
      ],
      cursor: { sync: { key: "step" }, points: { size: 6 } },
      hooks: {
        draw: [(u) => restartLines(u, axis)],
        setSeries: [(u, i, options) => {
          if (options.show != null) for (const edge of edges[i] || []) u.setSeries(edge, { show: options.show });
        }],
      },
    }, uPlot.join(found.map((one) => one.table)), holder);
    return u;
  }

  function drawAll(axis) {
    for (const { u } of drawn.splice(0)) u.destroy();
    for (const chart of charts) {
      const figure = document.querySelector(`figure[data-key="${chart.key}"]`);
      if (!tables(chart, axis).length) { figure.hidden = true; continue; } // nothing was measured
      const holder = figure.querySelector("div");
      drawn.push({ u: draw(chart, holder, axis), holder });
    }
    document.documentElement.dataset.drawn = drawn.length; // for tests
  }

  const select = document.querySelector("select.axis");
  drawAll("step");
  if (select) select.addEventListener("change", () => drawAll(select.value));
  addEventListener("resize", () => {
    for (const { u, holder } of drawn) u.setSize({ width: holder.clientWidth, height: u.height });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(({ u }) => u.redraw(false)));
})();
