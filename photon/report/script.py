"""What draws the charts of a page in a browser, with BokehJS.

It is a Python string, because Flower's app bundle carries no files of other kinds. All text goes into the page
as text, never as HTML.
"""

SCRIPT = r"""
"use strict";
const photon = (() => {
  const UNITS = {
    count: [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]],
    bytes: [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]],
    seconds: [[10800, "h", 3600], [180, "min", 60], [0, "s", 1]],
    share: [[0, "%", 0.01]],
  };
  const DASHES = [[], [6, 3], [2, 3], [7, 3, 2, 3]];
  const MARKERS = ["circle", "square", "triangle", "diamond"];
  const drawn = new Map();

  const colour = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const digits = (value) =>
    Number(value.toPrecision(5)).toLocaleString("en", {maximumSignificantDigits: 5});

  // The unit in which an axis is drawn: its length, and its name.
  function unit(axis, values) {
    let most = 0;
    for (const value of values) if (value !== null) most = Math.max(most, Math.abs(value));
    for (const [least, name, size] of UNITS[axis.kind] || []) {
      if (most >= least) return [size ?? least, name];
    }
    return [1, ""];
  }
  const labelled = (axis, name) => (name ? `${axis.label} (${name})` : axis.label);
  const scaled = (values, size, log) =>
    values.map((value) => (value === null || (log && value <= 0) ? NaN : value / size));
  const written = (values, size, name) =>
    values.map((value) => (value === null ? "–" : digits(value / size) + (name && ` ${name}`)));

  function figure(spec, more) {
    const plot = Bokeh.Plotting.figure({
      height: 290, sizing_mode: "stretch_width", toolbar_location: "above", tools: "",
      x_axis_type: spec.x.log ? "log" : "linear", y_axis_type: spec.y.log ? "log" : "linear",
      background_fill_alpha: 0, border_fill_alpha: 0, outline_line_alpha: 0, ...more,
    });
    const M = Bokeh.Models.get.bind(Bokeh.Models);
    const tools = {box: new (M("BoxZoomTool"))(), pan: new (M("PanTool"))(), reset: new (M("ResetTool"))()};
    plot.add_tools(tools.box, tools.pan, new (M("WheelZoomTool"))(), tools.reset, new (M("SaveTool"))());
    // A finger that wants to scroll the page must not zoom.
    plot.toolbar.active_drag = matchMedia("(pointer: coarse)").matches ? null : tools.box;
    plot.toolbar.active_scroll = null;
    plot.toolbar.logo = null;
    plot.toolbar.autohide = true;
    return plot;
  }

  function dress(plot, spec, xName, yName) {
    const text = {
      axis_label_text_color: colour("muted"), major_label_text_color: colour("muted"),
      axis_line_color: colour("line"), major_tick_line_color: colour("line"), minor_tick_line_color: null,
      axis_label_text_font_style: "normal", axis_label_text_font: "system-ui", major_label_text_font: "system-ui",
      major_label_text_font_size: "12px", axis_label_text_font_size: "12px",
    };
    for (const [axis, one, name] of [[plot.xaxis, spec.x, xName], [plot.yaxis, spec.y, yName]]) {
      for (const each of axis) {
        each.setv({...text, axis_label: labelled(one, name) || null});
        each.formatter = new (Bokeh.Models.get("BasicTickFormatter"))({use_scientific: !one.log});
        if (one.kind === "round") each.ticker = new (Bokeh.Models.get("BasicTicker"))({min_interval: 1});
      }
    }
    for (const grid of [...plot.xgrid, ...plot.ygrid]) grid.grid_line_color = colour("line");
  }

  function hover(plot, renderers, tooltips, more = {}) {
    plot.add_tools(new (Bokeh.Models.get("HoverTool"))({renderers, tooltips, ...more}));
  }

  // Each maker returns the plot, renderers by series, and how to show newer data without drawing anew.
  const makers = {
    lines(spec) {
      const xs = unit(spec.x, spec.series.flatMap((one) => one.x));
      const ys = unit(spec.y, spec.series.flatMap((one) => one.y));
      const plot = figure(spec);
      const content = (one) => ({
        x: scaled(one.x, xs[0], spec.x.log), y: scaled(one.y, ys[0], spec.y.log),
        at: written(one.x, ...xs), told: written(one.y, ...ys), name: one.x.map(() => one.name),
      });
      const sources = spec.series.map((one) => new Bokeh.ColumnDataSource({data: content(one)}));
      const renderers = spec.series.map((one, index) => {
        const look = {
          source: sources[index], line_color: colour(one.colour), line_width: one.strong ? 3 : 1.8,
          line_dash: DASHES[one.dash],
        };
        const made = [plot.line({field: "x"}, {field: "y"}, look)];
        made.push(plot.scatter({field: "x"}, {field: "y"}, {
          source: sources[index], marker: MARKERS[one.dash], size: one.x.length > 40 ? 1 : one.strong ? 6 : 5,
          fill_color: colour(one.colour), line_color: colour(one.colour),
        }));
        return made;
      });
      for (const one of spec.references) {
        if (one.y[0] === null) continue;
        plot.add_layout(new (Bokeh.Models.get("Span"))({
          location: one.y[0] / ys[0], dimension: "width", line_color: colour("muted"), line_dash: [6, 3],
        }));
        const most = Math.max(...spec.series.flatMap((each) => each.x)) / xs[0];
        plot.text([most], [one.y[0] / ys[0]], [one.name], {
          text_color: colour("muted"), text_font_size: "12px", text_font: "system-ui", text_align: "right",
          y_offset: -3,
        });
      }
      if (["count", "bytes", "share"].includes(spec.y.kind)) plot.y_range.start = 0;
      dress(plot, spec, xs[1], ys[1]);
      hover(plot, renderers.map((made) => made[1]),
            [["name", "@name"], [spec.x.label, "@at"], [spec.y.label, "@told"]]);
      const update = (next) => {
        const still = (axis, old, key) =>
          unit(axis, next.series.flatMap((one) => one[key])).join() === old.join();
        if (!still(next.x, xs, "x") || !still(next.y, ys, "y")) return false;
        next.series.forEach((one, index) => { sources[index].data = content(one); });
        return true;
      };
      return {plot, renderers, update};
    },

    bars(spec, hidden) {
      const shown = spec.series.filter((_, index) => !hidden.has(index));
      const sums = spec.series[0].x.map((_, place) =>
        shown.reduce((sum, one) => sum + (one.y[place] ?? 0), 0));
      const ys = unit(spec.y, sums);
      const plot = figure(spec);
      const base = sums.map(() => 0);
      for (const one of shown) {
        const bottom = [...base];
        one.y.forEach((value, place) => { base[place] += value ?? 0; });
        const source = new Bokeh.ColumnDataSource({data: {
          x: one.x, bottom: scaled(bottom, ys[0]), top: scaled(base, ys[0]),
          told: written(one.y, ...ys), name: one.x.map(() => one.name),
        }});
        const step = one.x.length > 1 ? one.x[1] - one.x[0] : 1;
        const made = plot.vbar({source, x: {field: "x"}, bottom: {field: "bottom"}, top: {field: "top"},
                                width: 0.8 * step, fill_color: colour(one.colour), line_color: null});
        hover(plot, [made], [["name", "@name"], [spec.x.label, "@x"], [spec.y.label, "@told"]]);
      }
      plot.y_range.start = 0;
      dress(plot, spec, "", ys[1]);
      return {plot, redraws: true};
    },

    lying(spec, hidden) {
      const shown = spec.series.filter((_, index) => !hidden.has(index));
      const sums = spec.names.map((_, place) => shown.reduce((sum, one) => sum + (one.y[place] ?? 0), 0));
      const xs = unit(spec.x, sums);
      const plot = rows(spec);
      const base = sums.map(() => 0);
      for (const one of shown) {
        const left = [...base];
        one.y.forEach((value, place) => { base[place] += value ?? 0; });
        const source = new Bokeh.ColumnDataSource({data: {
          y: one.x, left: scaled(left, xs[0]), right: scaled(base, xs[0]), row: spec.names,
          told: written(one.y, ...xs), name: one.x.map(() => one.name),
        }});
        const made = plot.hbar({source, y: {field: "y"}, left: {field: "left"}, right: {field: "right"},
                                height: 0.6, fill_color: colour(one.colour), line_color: null});
        hover(plot, [made], [["name", "@row"], ["part", "@name"], [spec.x.label, "@told"]]);
      }
      plot.x_range.start = 0;
      dress(plot, spec, xs[1], "");
      return {plot, redraws: true};
    },

    dots(spec) {
      const xs = unit(spec.x, spec.series.flatMap((one) => one.y));
      const plot = rows(spec);
      const ends = spec.names.map((_, place) => scaled(
        spec.series.map((one) => one.y[place]), xs[0], spec.x.log).filter(Number.isFinite));
      plot.segment(ends.map((all) => Math.min(...all)), ends.map((_, place) => place),
                   ends.map((all) => Math.max(...all)), ends.map((_, place) => place),
                   {line_color: colour("line"), line_width: 3});
      const renderers = spec.series.map((one) => {
        const source = new Bokeh.ColumnDataSource({data: {
          x: scaled(one.y, xs[0], spec.x.log), y: one.x, row: spec.names, told: written(one.y, ...xs),
          name: one.x.map(() => one.name),
        }});
        return [plot.scatter({field: "x"}, {field: "y"}, {
          source, marker: MARKERS[one.dash], size: 9, fill_color: colour(one.colour),
          line_color: colour(one.colour)})];
      });
      dress(plot, spec, xs[1], "");
      hover(plot, renderers.flat(), [["name", "@row"], ["part", "@name"], [spec.x.label, "@told"]]);
      return {plot, renderers};
    },

    grid(spec) {
      const {first, last, colours, shares, failed} = spec.cells;
      const columns = {left: [], right: [], top: [], bottom: [], fill: [], alpha: [], row: [], at: [], told: []};
      const crosses = {x: [], y: []};
      shares.forEach((row, place) => row.forEach((share, column) => {
        const [left, right] = [first[column] - 0.45, last[column] + 0.45];
        columns.left.push(left);
        columns.right.push(right);
        columns.top.push(place - 0.4);
        columns.bottom.push(place + 0.4);
        columns.fill.push(colour(share ? colours[place] : "line"));
        columns.alpha.push(share || 0.5);
        columns.row.push(spec.names[place]);
        columns.at.push(first[column] === last[column] ? `${first[column]}` : `${first[column]}–${last[column]}`);
        columns.told.push(failed[place][column] ? "failed" : share === 1 ? "took part" : share ? digits(share)
                          : "not sampled");
        if (failed[place][column]) {
          crosses.x.push((left + right) / 2);
          crosses.y.push(place);
        }
      }));
      const plot = rows(spec, Math.max(16, Math.min(46, 200 / spec.names.length)));
      const made = plot.quad({
        source: new Bokeh.ColumnDataSource({data: columns}), left: {field: "left"}, right: {field: "right"},
        top: {field: "top"}, bottom: {field: "bottom"}, fill_color: {field: "fill"},
        fill_alpha: {field: "alpha"}, line_color: null,
      });
      plot.scatter(crosses.x, crosses.y, {marker: "x", size: 9, line_width: 2.2, line_color: colour("bad")});
      dress(plot, spec, "", "");
      for (const grid of [...plot.xgrid, ...plot.ygrid]) grid.grid_line_color = null;
      hover(plot, [made], [["silo", "@row"], ["round", "@at"], ["state", "@told"]]);
      return {plot, redraws: true};
    },
  };

  function rows(spec, each = 34) {
    const plot = figure({...spec, y: {}}, {
      height: Math.round(80 + each * spec.names.length), y_range: [spec.names.length - 0.5, -0.5],
    });
    for (const axis of plot.yaxis) {
      axis.ticker = new (Bokeh.Models.get("FixedTicker"))({ticks: spec.names.map((_, place) => place)});
      axis.major_label_overrides = new Map(spec.names.map((name, place) => [
        place, name.length > 18 ? `${name.slice(0, 17)}…` : name]));
    }
    return plot;
  }

  async function draw(figure, spec) {
    const id = figure.id;
    const before = drawn.get(id);
    const hidden = before?.hidden ?? new Set();
    const place = figure.querySelector(".plot");
    const made = makers[spec.kind](spec, hidden);
    place.replaceChildren();
    const view = await Bokeh.Plotting.show(made.plot, place);
    before?.view?.remove?.();
    drawn.set(id, {...made, spec, hidden, view, figure});
    switchOff(drawn.get(id));
    figure.dataset.drawn = spec.kind;
  }

  function switchOff({renderers, hidden}) {
    renderers?.forEach((made, index) => made.forEach((one) => { one.visible = !hidden.has(index); }));
  }

  // A click on a name of a legend hides its series; with the alt key, all others.
  function toggle(button, alone) {
    const figure = button.closest("figure");
    const chart = drawn.get(figure.id);
    if (!chart) return;
    const buttons = [...figure.querySelectorAll(".legend button")];
    const index = buttons.indexOf(button);
    if (alone) {
      const others = buttons.map((_, place) => place).filter((place) => place !== index);
      const only = others.every((place) => chart.hidden.has(place));
      chart.hidden = new Set(only ? [] : others);
    } else if (!chart.hidden.delete(index)) chart.hidden.add(index);
    buttons.forEach((one, place) => one.setAttribute("aria-pressed", String(!chart.hidden.has(place))));
    drawn.set(figure.id, chart);
    if (chart.redraws) draw(figure, chart.spec);
    else switchOff(chart);
  }

  async function show(charts) {
    for (const [id, spec] of Object.entries(charts)) {
      const figure = document.getElementById(id);
      if (!figure?.querySelector(".plot")) continue;
      const chart = drawn.get(id);
      const names = (one) => JSON.stringify([one.kind, one.names, one.series.map((each) => each.name)]);
      if (chart?.figure === figure && chart.update && names(chart.spec) === names(spec)
          && chart.update(spec)) chart.spec = spec;
      else await draw(figure, spec);
      // Between two charts the page may scroll.
      await new Promise((done) => setTimeout(done));
    }
    document.documentElement.dataset.charts = "drawn";
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.(".legend button");
    if (button) toggle(button, event.altKey);
  });
  const again = () => { for (const {figure, spec} of [...drawn.values()]) draw(figure, spec); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  return {show};
})();
"""

#: In a file, the library is packed: half a megabyte in place of one and a half.
BEGIN = r"""
(async () => {
  const packed = document.getElementById("library").textContent;
  const bytes = Uint8Array.from(atob(packed), (one) => one.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const library = document.createElement("script");
  library.textContent = await new Response(stream).text();
  document.head.append(library);
  await photon.show(JSON.parse(document.getElementById("charts").textContent));
})();
"""
