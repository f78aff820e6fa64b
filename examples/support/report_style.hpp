// The look of the load report, in light and in dark.
#pragma once

#include <string_view>

namespace example::detail {

// One hue, its lightness ordered, so that load reads as intensity for
// everybody; in the dark the order turns, so that little load recedes into the
// page in both.
inline constexpr std::string_view report_style = R"css(
:root {
  --page: #fbfbfa; --ink: #1c2126; --soft: #59626b; --line: #d9dde1;
  --h0: #eef2f5; --h1: #d6e4ec; --h2: #b3d1dd; --h3: #83b6c9;
  --h4: #4d96b0; --h5: #257593; --h6: #0f5371; --h7: #06304a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181c; --ink: #e6e9ec; --soft: #a0aab3; --line: #333b43;
    --h0: #1d242a; --h1: #1c3641; --h2: #1a4d5f; --h3: #1e6a82;
    --h4: #338da8; --h5: #62b1c8; --h6: #9dd3e2; --h7: #e4f6fb;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1440px; margin: 0 auto; padding: 28px 32px 40px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 17px; margin: 0 0 6px; }
h2 small { font-weight: 400; font-size: 13px; color: var(--soft); margin-left: 4px; }
p { margin: 0 0 14px; max-width: 88ch; }
.lead { max-width: none; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 18px;
  margin: 18px 0 22px; font-size: 13px; color: var(--soft); }
.legend ul { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 0; padding: 0;
  list-style: none; }
.legend li { display: flex; align-items: center; gap: 6px; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.legend svg { width: 28px; height: 14px; }
.legend rect { stroke: var(--line); }
.panels { display: grid; gap: 26px 28px; margin-bottom: 30px;
  grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); }
figure { margin: 0; max-width: 680px; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: 13px; color: var(--soft); margin-top: 2px; }
.tick, .axis { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.mid { text-anchor: middle; }
.end { text-anchor: end; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 16px; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
thead th { color: var(--soft); font-size: 13px; }
thead tr:first-child th[colspan] { text-align: center; color: var(--ink); font-size: 14px; }
tbody tr:last-child > * { border-bottom-color: var(--soft); }
.note { font-size: 13px; color: var(--soft); margin-top: 14px; }
.h0 { fill: var(--h0); } .h1 { fill: var(--h1); } .h2 { fill: var(--h2); }
.h3 { fill: var(--h3); } .h4 { fill: var(--h4); } .h5 { fill: var(--h5); }
.h6 { fill: var(--h6); } .h7 { fill: var(--h7); }
)css";

}  // namespace example::detail
