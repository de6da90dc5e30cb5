"""How the page looks: one style sheet, light and dark, wide and narrow.

Law of this file: CSS only. Colours have names by meaning; charts use these names and no colour of
their own, so that dark mode and print need no second chart.
"""

CSS = """
:root { color-scheme: light dark; --back: #ffffff; --card: #ffffff; --text: #1c2024; --dim: #60646c;
  --line: #e3e5ea; --soft: #f3f4f7; --shipped: #0b68cb; --refused: #c62a2f; --reference: #6b7280;
  --warn-back: #fff6e0; --warn: #8f5600; --second: #d97706; }
@media (prefers-color-scheme: dark) { :root { --back: #101216; --card: #16191e; --text: #eceef1;
  --dim: #9ba1ab; --line: #2b2f37; --soft: #1e2229; --shipped: #5eb0ff; --refused: #ff8589;
  --reference: #9aa2af; --warn-back: #2e2410; --warn: #ffca6b; --second: #fbbf4d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 2px; }
p { margin: 4px 0; }
.dim, figcaption, th { color: var(--dim); }
figcaption, .why { font-size: 13px; color: var(--dim); margin: 0 0 12px; }
.lead { font-size: 17px; margin: 14px 0 20px; }
.warn { background: var(--warn-back); color: var(--warn); border-radius: 8px; padding: 10px 14px;
  margin: 0 0 14px; }
.warn p { overflow-wrap: anywhere; }
section, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px; margin: 0 0 16px; min-width: 0; }
.two { display: grid; gap: 16px; grid-template-columns: 1fr; }
.two > figure, .two > section { margin: 0; }
.two { margin-bottom: 16px; }
@media (min-width: 860px) { .two { grid-template-columns: 1fr 1fr; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th { font-weight: 500; text-align: left; font-size: 13px; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.n, th.n { text-align: right; }
td.wide { white-space: normal; overflow-wrap: anywhere; min-width: 15em; }
td.key { width: 1%; }
.tag { font-size: 12px; font-weight: 600; }
.shipped { color: var(--shipped); } .refused { color: var(--refused); }
.reference { color: var(--reference); }
svg { display: block; overflow: visible; width: 100%; }
svg text { font-size: 12px; fill: var(--dim); paint-order: stroke; stroke: var(--card);
  stroke-width: 3px; stroke-linejoin: round; }
.plot { margin: 6px 10px 34px 54px; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--dim); stroke-width: 1; }
.limit { stroke: var(--refused); stroke-width: 1.5; stroke-dasharray: 4 3; }
svg .shipped { fill: var(--shipped); stroke: var(--shipped); }
svg .refused { fill: var(--refused); stroke: var(--refused); }
svg .reference { fill: var(--reference); stroke: var(--reference); }
svg circle { stroke-width: 1.5; fill-opacity: .28; }
svg line.shipped, svg line.refused, svg line.reference { stroke-width: 2; }
svg text.shipped, svg text.refused, svg text.reference { stroke: var(--card); stroke-width: 3px; }
.front { stroke: var(--shipped); stroke-width: 1.5; stroke-dasharray: 2 4; }
.bar { fill-opacity: .85; stroke: none !important; }
.pale { fill-opacity: .25; stroke: none !important; }
.first { fill: var(--shipped); fill-opacity: .35; }
.second { stroke: var(--second); stroke-width: 1.5; }
.cut { fill: var(--refused); fill-opacity: .12; }
.edge { stroke: var(--refused); stroke-width: 1.2; }
.rows { display: grid;
  grid-template-columns: minmax(76px, max-content) minmax(60px, 1fr) max-content;
  column-gap: 12px; row-gap: 6px; align-items: center; font-size: 13px;
  font-variant-numeric: tabular-nums; }
.rows > .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; max-width: 190px; }
@media (max-width: 520px) { .rows > .name { max-width: 104px; } main { padding: 18px 12px 40px; }
  section, figure { padding: 14px 12px; } }
.rows > .value { text-align: right; color: var(--dim); }
.small { display: grid; gap: 16px 22px;
  grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); }
.small > div { min-width: 0; }
.small .name { font-size: 13px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.small .why { margin: 0; font-size: 12px; }
.key-first, .key-second, .key-cut { display: inline-block; width: 12px; height: 9px;
  margin: 0 4px 0 10px; }
.key-first { background: var(--shipped); opacity: .4; }
.key-second { border-bottom: 2px solid var(--second); height: 5px; vertical-align: 3px; }
.key-cut { background: var(--refused); opacity: .25; }
details { font-size: 14px; } summary { cursor: pointer; color: var(--dim); }
pre { font-size: 12px; overflow-x: auto; background: var(--soft); padding: 10px;
  border-radius: 6px; }
@media print { section, figure { break-inside: avoid; } }
"""
