/* Draws the charts of a report: each <figure data-chart="JSON"> becomes a uPlot with a legend below it.

   Point at a chart for the numbers, drag to zoom in, double-click (or use the button) to zoom out; a click on a name
   hides its curve. All text goes through textContent or the canvas, so that no name in it can become markup. */
(() => {
  "use strict";
  const FAINT = "4d", BAND = "30";  // opacities, as the last two digits of a colour

  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const number = value => {
    if (value == null) return "–";
    const size = Math.abs(value);
    if (value !== 0 && (size >= 1e5 || size < 1e-3)) return value.toExponential(2);
    return Number.isInteger(value) ? String(value) : value.toPrecision(Math.max(3, Math.ceil(Math.log10(size + 1)))); 
  };
  const element = (tag, name, text) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  /* The columns of uPlot: one for each line, and before it one for its faint numbers, or two for its band. */
  const columns = spec => {
    const tables = [], series = [{label: spec.x}], bands = [], mains = [];
    spec.lines.forEach((line, place) => {
      const colour = line.guide ? css("--muted") : css("--c" + line.colour);
      const add = (y, options) => {
        tables.push([line.x, y]);
        series.push({label: line.label, points: {show: false}, ...options});
        return series.length - 1;
      };
      if (line.faint) add(line.faint, {stroke: colour + FAINT, width: 1, part: place});
      if (line.low) {
        const high = add(line.high, {stroke: "transparent", width: 0, part: place});
        const low = add(line.low, {stroke: "transparent", width: 0, part: place});
        bands.push({series: [high, low], fill: colour + BAND});
      }
      mains.push(add(line.y, {
        stroke: colour, fill: undefined, width: line.guide ? 1 : 2, dash: line.dash, part: place,
        points: {show: Boolean(line.dots && !line.counts), size: 6, fill: colour, stroke: colour},
      }));
    });
    // uPlot wants x in rising order; an evaluation may have been repeated at an earlier step.
    const rising = tables.map(([x, y]) => {
      const order = x.map((_, i) => i).sort((a, b) => x[a] - x[b]);
      return [order.map(i => x[i]), order.map(i => y[i])];
    });
    return {data: uPlot.join(rising), series, bands, mains};
  };

  const shadeStages = spec => plot => {
    const {ctx, bbox} = plot, ratio = devicePixelRatio;
    spec.stages.forEach(([first, last, label], i) => {
      const left = Math.max(plot.valToPos(first, "x", true), bbox.left);
      const right = Math.min(plot.valToPos(last, "x", true), bbox.left + bbox.width);
      if (right <= left) return;
      ctx.save();
      ctx.fillStyle = css("--stage" + i % 2);
      ctx.fillRect(left, bbox.top, right - left, bbox.height);
      ctx.fillStyle = css("--muted");
      ctx.font = 11 * ratio + "px system-ui, sans-serif";
      ctx.textAlign = "center";
      const short = label.split(" · ").pop();
      const text = ctx.measureText(label).width < right - left ? label : short;
      if (ctx.measureText(text).width < right - left) ctx.fillText(text, (left + right) / 2, bbox.top - 6 * ratio);
      ctx.restore();
    });
  };

  /* Dots whose area grows with the number of responses behind them. */
  const drawDots = spec => plot => {
    spec.lines.filter(line => line.counts).forEach(line => {
      const {ctx} = plot, most = Math.max(...line.counts);
      ctx.save();
      ctx.fillStyle = css("--c" + line.colour) + "bf";
      line.x.forEach((x, i) => {
        if (line.y[i] == null) return;
        ctx.beginPath();
        const radius = (2.5 + 6.5 * Math.sqrt(line.counts[i] / most)) * devicePixelRatio;
        ctx.arc(plot.valToPos(x, "x", true), plot.valToPos(line.y[i], "y", true), radius, 0, 2 * Math.PI);
        ctx.fill();
      });
      ctx.restore();
    });
  };

  const axis = (label, size) => ({
    label, size, labelSize: 18, gap: 4, font: "11px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif",
    stroke: () => css("--muted"), grid: {stroke: () => css("--line"), width: 1},
    ticks: {stroke: () => css("--line"), width: 1, size: 4},
  });

  const options = (spec, parts, width, legend) => ({
    width, height: 250, padding: [spec.stages.length ? 20 : 8, 12, 0, 0],
    legend: {show: false},
    cursor: {
      drag: {x: true, y: false, dist: 5},
      points: {size: 7},
      ...(spec.x === "iteration" ? {sync: {key: "iteration", setSeries: false, scales: ["x", null]}} : {}),
    },
    scales: {
      x: {time: false, range: xRange(spec)},
      y: {distr: spec.log ? 3 : 1, ...(spec.yRange ? {range: spec.yRange} : {})},
    },
    axes: [
      {...axis(spec.x, 32), incrs: spec.x === "iteration" ? [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 1e4,
        2e4, 5e4, 1e5, 1e6] : undefined},
      {...axis(spec.unit, 52), values: (plot, ticks) => ticks.map(tick => tick == null ? "" : compact(tick))},
    ],
    series: parts.series,
    bands: parts.bands,
    hooks: {
      drawClear: [shadeStages(spec)],
      draw: [drawDots(spec)],
      setCursor: [legend],
      setScale: [(plot, key) => key === "x" && plot.root.closest("figure")?.classList.toggle("zoomed", isZoomed(plot, spec))],
    },
  });
  const compact = value => {
    const size = Math.abs(value);
    if (size >= 1e6) return value / 1e6 + "M";
    if (size >= 1e4) return value / 1e3 + "k";
    if (value !== 0 && size < 1e-3) return value.toExponential(0);
    return String(Math.round(value * 1e6) / 1e6);
  };
  const isWhole = (plot, low, high) =>
    plot.data[0].length < 2 || (low === plot.data[0][0] && high === plot.data[0].at(-1));
  /* The whole range is the spec's; a part of it is what the reader has chosen by dragging. */
  const xRange = spec => (plot, low, high) =>
    low == null || isWhole(plot, low, high) ? spec.xRange ?? widened(low ?? 0, high ?? 1) : [low, high];
  const widened = (low, high) => low === high ? [low - 1, high + 1] : [low, high];
  const isZoomed = (plot, spec) => {
    const {min, max} = plot.scales.x, [low, high] = xRange(spec)(plot, plot.data[0][0], plot.data[0].at(-1));
    return min !== low || max !== high;
  };

  /* On a phone: one finger tells the numbers, two fingers zoom in along x. */
  const onTouch = plot => {
    let held = null;  // the values under two fingers
    const places = event => {
      const left = plot.over.getBoundingClientRect().left;
      return [...event.touches].map(touch => touch.clientX - left);
    };
    const begin = event => {
      const at = places(event);
      held = at.length === 2 ? at.map(place => plot.posToVal(place, "x")) : null;
      if (!held) plot.setCursor({left: at[0], top: plot.over.clientHeight / 2});
    };
    const move = event => {
      const at = places(event);
      if (!held || at.length !== 2) return begin(event);
      const unit = (held[1] - held[0]) / (at[1] - at[0]);
      const whole = xRange({xRange: null})(plot, plot.data[0][0], plot.data[0].at(-1));
      const min = Math.max(held[0] - at[0] * unit, whole[0]), max = Math.min(min + plot.over.clientWidth * unit, whole[1]);
      if (unit > 0 && max > min) plot.setScale("x", {min, max});
    };
    plot.over.addEventListener("touchstart", begin, {passive: true});
    plot.over.addEventListener("touchmove", move, {passive: true});
  };

  const draw = figure => {
    const spec = JSON.parse(figure.dataset.chart), parts = columns(spec);
    const box = figure.querySelector(".plot"), key = figure.querySelector(".key-list");
    box.replaceChildren();
    key.replaceChildren();
    const at = element("li", "at"), values = [];
    key.append(at);
    let plot = null;
    spec.lines.forEach((line, place) => {
      const item = element("li"), button = element("button", line.guide ? "guide" : "");
      const swatch = element("i", "swatch" + (line.dash ? " dashed" : ""));
      swatch.style.borderTopColor = line.guide ? css("--muted") : css("--c" + line.colour);
      values[place] = element("b");
      button.type = "button";
      button.title = "show or hide this curve";
      button.setAttribute("aria-pressed", "true");
      button.append(swatch, element("span", "", line.label), values[place]);
      button.addEventListener("click", () => {
        const show = !plot.series[parts.mains[place]].show;
        plot.series.forEach((one, i) => one.part === place && plot.setSeries(i, {show}));
        button.setAttribute("aria-pressed", String(show));
      });
      item.append(button);
      key.append(item);
    });
    const legend = shown => {
      const i = shown.cursor.idx;
      at.textContent = i == null ? "" : `${spec.x} ${number(shown.data[0][i])}`;
      spec.lines.forEach((line, place) => {
        const value = i == null ? undefined : shown.data[parts.mains[place]][i];
        values[place].textContent = value == null || line.guide ? "" : number(value)
          + (line.counts ? ` (${line.counts[line.x.indexOf(shown.data[0][i])]} responses)` : "");
      });
    };
    plot = new uPlot(options(spec, parts, Math.max(box.clientWidth, 200), legend), parts.data, box);
    onTouch(plot);
    figure.querySelector(".reset").onclick = () => plot.setData(parts.data, true);
    figure.classList.remove("zoomed");
    figure.plot = plot;
    return plot;
  };

  const figures = [...document.querySelectorAll("figure[data-chart]")];
  const drawAll = () => figures.forEach(figure => {
    if (figure.plot) figure.plot.destroy();
    figure.plot = null;
    if (figure.offsetParent !== null) draw(figure);
  });
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  document.querySelectorAll("details").forEach(one => one.addEventListener("toggle", drawAll));
  new ResizeObserver(() => figures.forEach(figure => {
    const width = Math.max(figure.querySelector(".plot").clientWidth, 200);
    if (figure.plot && figure.plot.width !== width) figure.plot.setSize({width, height: figure.plot.height});
  })).observe(document.querySelector("main"));
})();
