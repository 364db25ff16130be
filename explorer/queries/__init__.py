"""Every SELECT of the explorer: one function per question, a DataFrame as the answer.

overview    token_count(run, *, domain, phase)          domain_counts(run)
            gate_means(run, *, domain, phase)
load        expert_load(run, *, layer, site, domain, phase)
            expert_load_by_domain(run, layer, *, site, phase)
            expert_load_by_phase(run, layer, *, site, domain)
            routing(run, layer, *, site, domain, phase, part, max_tokens)    arrays, batch by batch
prompts     prompts(run, *, domain, search, limit, offset)      prompt(run, prompt_id)
            prompt_count(run, *, domain, search)        prompt_tokens(run, prompt_ids)
tokens      tokens(run, prompt_id)                      token(run, token_id)
            token_quantity(run, prompt_id, quantity, *, pinned)     long frame, token x site
            token_strip(run, prompt_id, quantity, *, layer, site, pinned)   one value per token
            token_experts(run, token_id)                token_gates(run, token_id)
            token_scores(run, token_id, layer, *, site)             QUANTITIES
experts     expert_tokens(run, layer, expert_id, *, site, domain, phase, limit, context)
            expert_token_count(run, layer, expert_id, ...)          expert_token_ids(...)
            expert_vocabulary(run, layer, expert_id, ..., min_count, limit)
specialization
            expert_hits(run, layer, expert_id, ...)     tokens_of_text(run, text, ...)
            loads_by_domain(run, ...)   occurrences(run, ...)   route_sample(run, ...)
attention   attention_prompts(run, *, domain)               attention_layers(run)
            head_stats(run, *, domain, prompt_id)           head_map(run, prompt_id, layer, head)
            attended_keys(run, token_id, layer, head)       prompt_keys(run, prompt_id, layer, head)
            layer_keys(run, prompt_ids, layer, *, head)
pairs       transitions(run, layer, *, domain, phase)       coactivation(run, layer, *, site, ...)
            tokens_of_both(run, first, second, ...)         both_count(run, first, second, ...)
clusters    vector_counts(run, layer, *, site)      token_vectors(run, feature, layer, *, site)
            signatures(run)             token_facts(...)    prompt_facts(...)   expert_facts(run)
            matching_tokens(run, ...)               matching_prompts(run, ...)
            expert_counts(run, layer, *, ids, of)   expert_domains(run)
points      PointTable(table): density, select(region), rows, values; of a map, not of a run
routes      prompt_experts(run, prompt_id, layer, *, site)
            prompts_experts(run, prompt_ids, layer, *, site)

part        Part: tokens of prompts that contain a text, or of a slice; most questions take one

``domain=None`` and ``phase=None`` mean all; ``domain=""`` means prompts without a domain. Missing
values stay missing (None, NaN or NA) and are never 0; a count of nothing is 0. ``overview`` and
``load`` (save ``routing``) read totals only, so their time does not grow with the number of (token,
layer) rows, unless they are asked of a part; a run of schema 2 has no totals for ``gate_means``.
"""
