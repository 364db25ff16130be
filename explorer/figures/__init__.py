"""Pure functions from DataFrames to plotly figures; all text from outside is escaped here.

load        load_heatmap(load, *, scope, order, pins, dark)     layer x expert, clickable
            load_bars(load, *, scope, pins, layer, dark)        lorenz(load, *, scope, layer, dark)
            domain_heatmap(load, *, scope, by, layer, dark)     floor_note(floor)
experts     interval_dots(rows, axis, *, title, scope, notes, y_title, dark)
            divergence_heatmap(found, *, scope, dark)
            layer_lines(found, measure, *, title, y_title, percent, scope, notes, dark)
balance     balance_over_layers(table, metric, *, scope, dark)  METRIC_TEXTS
            capacity_curve(curve, *, layer, capacity_factor, zero_from, n_batches, scope, dark)
tokens      token_layer_heatmap(values, quantity, *, scope, start, dark)
            token_routes(experts, *, token_text, pins, dark)
            score_bars(scores, *, layer, token_text, unit, baseline, order, column, dark)
attention   head_overview(stats, layers, measure, *, baseline, scope, n_prompts, chosen, dark)
            head_heatmap(found, *, name, scope, window, dark)               MEASURES
attention_window
            token_window(found, window, texts, change, *, name, routed, scope, keys, token, dark)
together    together_figure(heads, *, attention_layer, routed, chosen, n_prompts, scope, dark)
flow        sankey(hops, *, n_flows, scope, dark)   pair_heatmap(pairs, *, scope, chosen, dark)
clusters    map_points(x, y, shown, *, texts, color, ...)   map_density(density, ...)
            lift_bars(found, names, ids, *, title, caption, dark)
caption     Scope(n_tokens, domain, phase, complete), the tokens behind a figure
text        visible(text), label(text), domain_label(domain)
theme       template(dark), hues(dark), pin_colors(pins, dark), SEQUENTIAL, diverging(dark)

A click returns ``customdata`` that starts with [layer, site, expert], or [layer, site, token_id]
in ``token_layer_heatmap``; figures of attention and flow say their own; numbers may arrive as
floats. ``explorer.balance`` makes the tables for
``balance``: balance_table(load, *, n_tokens), capacity_table(chosen, n_experts, factors),
smallest_safe_factor(chosen, n_experts). Show figures with ``theme=None``: they bring their own.
"""
