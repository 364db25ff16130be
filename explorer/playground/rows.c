// The inner loop of the page's model: rows of x times rows of w, in float32, four lanes at a time.
//
//   y[t][o] = sum over i of x[t][i] * w[o][i]        t < n, o < outs, i < ins
//
// Strides (xs, ws, ys) are in floats; `ins` is a multiple of 4. Built into rows.wasm by
//   python -m ziglang cc --target=wasm32-freestanding -O2 -msimd128 -nostdlib \
//       -Wl,--no-entry -Wl,--import-memory -Wl,--strip-all -o rows.wasm rows.c
typedef float v4 __attribute__((vector_size(16), aligned(4)));

static float sum(v4 a) { return (a[0] + a[1]) + (a[2] + a[3]); }
static v4 at(const float *p) { return *(const v4 *)p; }

__attribute__((export_name("rows"))) void rows(const float *x, int xs, int n,
                                               const float *w, int ws, int outs,
                                               int ins, float *y, int ys) {
  int t = 0;
  for (; t + 4 <= n; t += 4) {
    const float *a = x + t * xs, *b = a + xs, *c = b + xs, *d = c + xs;
    float *z = y + t * ys;
    int o = 0;
    // four tokens and two outputs share what is read
    for (; o + 2 <= outs; o += 2) {
      const float *u = w + o * ws, *v = u + ws;
      v4 au = {0}, av = {0}, bu = {0}, bv = {0}, cu = {0}, cv = {0}, du = {0}, dv = {0};
      for (int i = 0; i < ins; i += 4) {
        v4 p = at(u + i), q = at(v + i), r;
        r = at(a + i), au += r * p, av += r * q;
        r = at(b + i), bu += r * p, bv += r * q;
        r = at(c + i), cu += r * p, cv += r * q;
        r = at(d + i), du += r * p, dv += r * q;
      }
      z[o] = sum(au), z[o + 1] = sum(av);
      z[ys + o] = sum(bu), z[ys + o + 1] = sum(bv);
      z[2 * ys + o] = sum(cu), z[2 * ys + o + 1] = sum(cv);
      z[3 * ys + o] = sum(du), z[3 * ys + o + 1] = sum(dv);
    }
    for (; o < outs; o++) {
      v4 au = {0}, bu = {0}, cu = {0}, du = {0};
      for (int i = 0; i < ins; i += 4) {
        v4 p = at(w + o * ws + i);
        au += at(a + i) * p, bu += at(b + i) * p, cu += at(c + i) * p, du += at(d + i) * p;
      }
      z[o] = sum(au), z[ys + o] = sum(bu), z[2 * ys + o] = sum(cu), z[3 * ys + o] = sum(du);
    }
  }
  for (; t < n; t++)
    for (int o = 0; o < outs; o++) {
      const float *a = x + t * xs, *u = w + o * ws;
      v4 p = {0}, q = {0};
      int i = 0;
      for (; i + 8 <= ins; i += 8)
        p += at(a + i) * at(u + i), q += at(a + i + 4) * at(u + i + 4);
      for (; i < ins; i += 4) p += at(a + i) * at(u + i);
      y[t * ys + o] = sum(p + q);
    }
}
