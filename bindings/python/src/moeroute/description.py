"""What of a router's description decides its weights: for the modules that differentiate them."""

# The words of a description that do not change weights, or are taken care of by whoever made the logits.
_INERT = {"E", "k", "selection", "bias", "groups", "topk_group", "group_score", "group_fill", "ties", "gate_bias",
          "zero_experts", "shared_experts", "capacity", "drop_order", "output_scale", "weight_on", "remark"}
_KNOWN = {"score", "score_domain", "normalize", "lp_p", "eps", "eps_mode", "scale", "scale_where",
          "post_divide_by_k", "per_expert_scale", "logit_softcap", "temperature"}


def words_of(router, where):
    """The words of router.spec; ValueError in the name of `where` if one has no derivative there."""
    words = dict(word.partition("=")[::2] for word in router.spec.split())
    unknown = set(words) - _INERT - _KNOWN
    if words.get("selection", "top_k") not in ("top_k", "hash_table", "top2_second_by_logit") or unknown:
        raise ValueError(f"{where}: the weights of '{router.spec}' have no derivative here")
    return words
