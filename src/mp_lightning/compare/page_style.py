"""How the page of a comparison looks: light or dark as the reader's system is, and as narrow as a telephone."""

STYLE = """
:root {
  --ground: #ffffff; --ink: #1c1f23; --soft: #5b636d; --line: #d9dde2; --raised: #f5f6f8;
  --good: #00694f; --bad: #a83f00; --open: #545b64;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #15181c; --ink: #e6e8eb; --soft: #a0a8b2; --line: #353b43; --raised: #1e2228;
    --good: #4cc7a2; --bad: #ff9a5c; --open: #b3bac3;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.75rem 0 .35rem; }
p { margin: .35rem 0 .75rem; max-width: 90ch; }
header p, figcaption, summary { color: var(--soft); }
small { display: block; color: var(--soft); font-size: .8em; font-weight: 400; }
#verdict { margin-top: 1.25rem; padding: .25rem 1.25rem .75rem; background: var(--raised); border-radius: 10px; }
#verdict h2 { margin-top: .75rem; font-size: 1rem; color: var(--soft); font-weight: 600; }
#verdict > p { font-size: 1.1rem; }
#verdict details p { font-size: .95rem; }
summary { cursor: pointer; }
.badge {
  display: inline-block; padding: 0 .55em; border: 1.5px solid; border-radius: 1em;
  font-size: .82em; line-height: 1.55; white-space: nowrap;
}
.good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--open); }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; line-height: 1.35; overflow-wrap: normal; }
th, td { padding: .45rem .6rem; text-align: right; vertical-align: top; font-variant-numeric: tabular-nums; }
td, td small { white-space: nowrap; }
thead th { vertical-align: bottom; color: var(--soft); font-weight: 600; min-width: 4.5rem; }
tbody tr { border-top: 1px solid var(--line); }
tbody tr:first-child { border-top: 0; }
thead + tbody tr:first-child { border-top: 1px solid var(--line); }
th:first-child { position: sticky; left: 0; background: var(--ground); text-align: left; }
th:first-child div { min-width: 7rem; max-width: 11rem; width: max-content; overflow-wrap: anywhere; }
.arm { position: relative; padding-left: 1.05em; }
.arm::before {
  content: ""; position: absolute; left: 0; top: .4em; width: .6em; height: .6em; border-radius: var(--corner);
  background: var(--colour);
}
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; width: 100%; min-width: 12rem; }
.facts th { font-weight: 400; color: var(--soft); }
.pictures { display: grid; gap: 0 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.whole { grid-column: 1 / -1; }
figure { margin: 1rem 0 2rem; min-width: 0; }
figcaption { max-width: 90ch; margin-top: .5rem; font-size: .9rem; }
.panels { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.panels.small { gap: .5rem; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.panels svg { display: block; width: 100%; height: auto; }
.panels.small svg { max-width: 260px; }
dl { display: grid; gap: .75rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
dt { font-weight: 600; } dd { margin: 0; color: var(--soft); font-size: .92rem; }
pre {
  margin: .5rem 0 1rem; padding: .75rem 1rem; background: var(--raised); border-radius: 10px;
  font-size: .82rem; white-space: pre-wrap; overflow-wrap: anywhere;
}
"""
