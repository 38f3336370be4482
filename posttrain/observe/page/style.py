"""The report page's style sheet: system fonts, light and dark, from phone to desktop."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #14181d; --muted: #56606b; --line: #dde2e8; --soft: #eef1f5;
  --good: #0f7b42; --good-soft: #dff3e7; --bad: #b4231a; --bad-soft: #fbe4e2; --warn: #8a5a00; --warn-soft: #fbeecd;
  --c0: #2563eb; --c1: #c2410c; --c2: #0f766e; --c3: #9333ea;
  --c4: #be123c; --c5: #4d7c0f; --c6: #0e7490; --c7: #a16207;
  --base: #69737f; --student: #14181d;
  --p1: #fdf0d5; --p2: #fbdfa8; --p3: #f8c57c; --p4: #f4a15d;
  --k1: #e6edfd; --k2: #ccdafb; --k3: #a9c1f8; --k4: #86a6f2;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0d1014; --card: #161a20; --ink: #e8ebef; --muted: #9ba5b1; --line: #2a313a; --soft: #1e242c;
    --good: #5fd38d; --good-soft: #12301f; --bad: #ff8f85; --bad-soft: #3d1714; --warn: #f0c05a; --warn-soft: #38290a;
    --c0: #6ea0ff; --c1: #ff9457; --c2: #3cc9b6; --c3: #c592ff;
    --c4: #ff7d95; --c5: #a3d65c; --c6: #4cc9e6; --c7: #ebc04a;
    --base: #8c97a4; --student: #f2f4f7;
    --p1: #33280f; --p2: #4f3a10; --p3: #714c11; --p4: #8f5a16;
    --k1: #17223d; --k2: #1f3160; --k3: #2a4387; --k4: #3757ab;
  }
}
.c0 { --colour: var(--c0); } .c1 { --colour: var(--c1); } .c2 { --colour: var(--c2); } .c3 { --colour: var(--c3); }
.c4 { --colour: var(--c4); } .c5 { --colour: var(--c5); } .c6 { --colour: var(--c6); } .c7 { --colour: var(--c7); }
.cbase { --colour: var(--base); }
.cstudent { --colour: var(--student); }

* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
.wrap { max-width: 1140px; margin: 0 auto; padding: 0 24px; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin: 0 0 4px; }
h3 { font-size: 1rem; margin: 24px 0 8px; }
p { margin: 0 0 12px; max-width: 84ch; }
a { color: var(--c0); text-underline-offset: 3px; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .86rem/1.5 var(--mono); }
code { font: .9em var(--mono); }
section { padding: 32px 0 6px; }
.lead, .note { color: var(--muted); }
.good { color: var(--good); }
.bad { color: var(--bad); }
.warn { color: var(--warn); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px; }
.grid {
  display: grid; gap: 16px; margin: 16px 0;
  grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr));
}
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }

.skip { position: absolute; left: -9999px; }
.skip:focus { left: 12px; top: 12px; background: var(--card); padding: 8px 14px; border-radius: 8px; z-index: 1; }
header.top { padding: 40px 0 8px; }
.title { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; margin-bottom: 4px; }
.pill { border-radius: 99px; padding: 2px 12px; font-size: .86rem; font-weight: 600; }
.pill.good { background: var(--good-soft); }
.pill.bad { background: var(--bad-soft); }
.pill.warn { background: var(--warn-soft); }
.tiles {
  display: grid; gap: 12px; margin: 22px 0 0; padding: 0;
  grid-template-columns: repeat(auto-fit, minmax(min(160px, 46%), 1fr));
}
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 12px 16px; }
.tiles dt, .tiles .note { color: var(--muted); font-size: .84rem; line-height: 1.4; }
.tiles dd { margin: 0; }
.tiles .value { font-size: 1.5rem; font-weight: 650; letter-spacing: -.02em; line-height: 1.35; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 0; margin: 18px 0 0; }
nav { font-size: .93rem; }
.notice {
  border: 1px solid var(--line); border-left: 4px solid var(--warn); border-radius: 4px 12px 12px 4px;
  background: var(--card); padding: 12px 16px; margin: 20px 0 0;
}
.notice.bad { border-left-color: var(--bad); color: inherit; }
.notice > :last-child { margin-bottom: 0; }

.pipeline {
  display: grid; align-items: stretch; margin: 16px 0;
  grid-template-columns: minmax(190px, 1fr) 44px minmax(0, 2.6fr) 44px minmax(190px, 1fr);
}
.pipeline > .end { display: flex; flex-direction: column; justify-content: center; gap: 14px; }
.lanes { display: grid; grid-auto-rows: 1fr; gap: 14px; }
.lane { display: flex; gap: 20px; align-items: stretch; }
.lane > .step { flex: 1 1 0; min-width: 0; position: relative; }
.lane > .step + .step::before {
  content: "→"; position: absolute; left: -18px; top: 50%; transform: translateY(-50%);
  color: var(--muted); font-size: 15px; line-height: 1;
}
.step {
  background: linear-gradient(var(--colour) 0 0) top / 100% 4px no-repeat border-box, var(--card);
  border: 1px solid var(--line); border-radius: 10px; padding: 14px 14px 10px;
}
.step.pending { border-style: dashed; background: none; }
.step h3 { margin: 0; font-size: .95rem; overflow-wrap: anywhere; line-height: 1.35; }
.step .kind, .step .score, .step .time { font-size: .82rem; color: var(--muted); line-height: 1.4; margin: 0; }
.step .kind, .step .domain { display: block; }
.step .score { margin-top: 6px; }
.step .score b { color: var(--ink); font-size: 1.2rem; letter-spacing: -.01em; margin-right: 4px; white-space: nowrap; }
.step .interval { white-space: nowrap; }
.step .time { margin-top: 6px; }
.step .time span { white-space: nowrap; }
.fan { width: 44px; height: 100%; display: block; }
.fan path { fill: none; stroke: var(--muted); stroke-width: 1.5; opacity: .6; vector-effect: non-scaling-stroke; }
.down { display: none; }

figure { margin: 0; }
figure.wide { margin: 16px 0; }
figcaption { display: flex; flex-direction: column; margin-bottom: 8px; }
figcaption .note { font-size: .84rem; line-height: 1.4; }
.chart > svg { display: block; width: 100%; height: auto; max-width: 480px; margin: 0 auto; }
svg text { font-size: 11px; fill: var(--muted); }
svg .ink { fill: var(--ink); }
svg .strong { font-weight: 650; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .limit { stroke: var(--bad); stroke-width: 1.2; stroke-dasharray: 3 3; }
svg .curve { fill: none; stroke: var(--colour); stroke-width: 2; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 5 3; }
svg .raw { fill: none; stroke: var(--colour); stroke-width: 1; opacity: .28; }
svg .band { stroke: var(--colour); stroke-width: 8; opacity: .3; }
svg .dot { fill: var(--colour); stroke: var(--card); stroke-width: 1; }
.legend {
  list-style: none; margin: 8px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: .86rem;
}
.legend li { display: flex; align-items: center; gap: 7px; }
.legend svg { flex: none; }

.scroll {
  overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 12px; margin: 16px 0;
}
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { text-align: left; padding: 12px 16px 10px; font-weight: 650; }
caption span { display: block; max-width: calc(100vw - 60px); }
caption .note { font-weight: 400; font-size: .86rem; line-height: 1.4; }
th, td { padding: 8px 16px; text-align: right; border-top: 1px solid var(--line); vertical-align: top; }
th, td { white-space: nowrap; }
thead th { color: var(--muted); font-weight: 600; font-size: .84rem; }
th:first-child { text-align: left; }
tbody th { font-weight: 500; }
tbody .wraps { white-space: normal; overflow-wrap: anywhere; }
td small { color: var(--muted); display: block; font-size: .8rem; font-weight: 400; }
td.own { background: var(--soft); font-weight: 650; }

.timeline { list-style: none; margin: 12px 0 0; padding: 0; display: grid; gap: 10px; }
.timeline li {
  display: grid; grid-template-columns: minmax(100px, 2fr) minmax(60px, 5fr) 74px; gap: 12px; align-items: center;
  font-size: .9rem; line-height: 1.3;
}
figure.wide .timeline li { grid-template-columns: 210px 1fr 74px; }
.timeline .name { overflow-wrap: anywhere; }
.timeline .amount { text-align: right; color: var(--muted); white-space: nowrap; }
.track { position: relative; height: 16px; background: var(--soft); border-radius: 5px; overflow: hidden; }
.track i { position: absolute; top: 0; bottom: 0; min-width: 2px; border-radius: 4px; background: var(--colour); }

.sample { margin: 0 0 12px; }
.sample dl {
  display: grid; grid-template-columns: minmax(90px, 190px) 1fr; gap: 6px 16px; margin: 12px 0 0;
  border-top: 1px solid var(--line); padding-top: 10px;
}
.sample dt { color: var(--muted); font-size: .86rem; overflow-wrap: anywhere; }
.sample dd { margin: 0; min-width: 0; display: flex; flex-wrap: wrap; gap: 2px 20px; align-items: baseline; }
.trace { margin: 0 0 10px; padding: 10px 16px; }
.trace summary { font-weight: 500; }
.trace > pre { margin-bottom: 12px; }
.tokens { font: .95rem/1.9 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; max-width: none; }
.t { padding: 2px 0; border-radius: 2px; box-shadow: 0 0 0 1px var(--line); }
.t.given { color: var(--muted); font-style: italic; }
.p1 { background: var(--p1); } .p2 { background: var(--p2); }
.p3 { background: var(--p3); } .p4 { background: var(--p4); }
.k1 { background: var(--k1); } .k2 { background: var(--k2); }
.k3 { background: var(--k3); } .k4 { background: var(--k4); }
.key { display: grid; grid-template-columns: max-content 1fr; gap: 6px 16px; margin: 0 0 16px; font-size: .86rem; }
.key dt { color: var(--muted); }
.key dd { margin: 0; display: flex; flex-wrap: wrap; gap: 4px; }
.key .t { padding: 1px 8px; }
.verdict { font-size: .82rem; font-weight: 600; white-space: nowrap; }
.command { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
details { margin: 16px 0; }
summary { cursor: pointer; font-weight: 600; }
details pre { margin-top: 10px; background: var(--soft); padding: 14px; border-radius: 8px; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 12px 0; font-size: .93rem; }
dl.facts dt { color: var(--muted); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
footer { color: var(--muted); font-size: .86rem; padding-top: 24px; padding-bottom: 48px; }

@media (max-width: 900px) {
  .pipeline { grid-template-columns: minmax(0, 1fr); }
  .fan { display: none; }
  .lanes { grid-auto-rows: auto; }
  .down { display: block; text-align: center; color: var(--muted); line-height: 1; padding: 8px 0; }
}
@media (max-width: 560px) {
  .wrap { padding: 0 16px; }
  .skip { position: absolute; left: -9999px; }
.skip:focus { left: 12px; top: 12px; background: var(--card); padding: 8px 14px; border-radius: 8px; z-index: 1; }
header.top { padding-top: 24px; }
  h1 { font-size: 1.6rem; }
  .card { padding: 14px; }
  .tiles .value { font-size: 1.3rem; }
  th, td { padding: 8px 8px; }
  th:last-child, td:last-child { padding-right: 10px; }
  th:first-child { padding-left: 10px; }
  tbody th { white-space: normal; min-width: 6.5rem; }
  table { font-size: .88rem; }
  caption { padding: 12px 10px 8px; }
  .lane { flex-wrap: wrap; }
  .lane > .step { flex: 1 1 130px; }
  .timeline li, figure.wide .timeline li { grid-template-columns: 1fr auto; gap: 2px 12px; }
  .timeline .track { grid-column: 1 / -1; grid-row: 2; }
  .sample dl { grid-template-columns: 1fr; gap: 0; }
  .sample dd { margin-bottom: 8px; }
  dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: 6px; }
}
@media print {
  nav { display: none; }
  .card, .scroll, figure { break-inside: avoid; }
}
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
"""
