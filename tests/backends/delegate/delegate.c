/* An external delegate for the tests: takes every ADD of FP32 tensors of one shape, and adds
 * `offset` to each sum, so that an answer tells who computed it.
 *
 * Options: offset=NUMBER; fail=create|prepare|run; device=PATH, which it opens for reading and
 * writing. The structures are the beginnings of those in
 * tensorflow/lite/core/c/common.h; what lies behind is not touched. */
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef enum { kOk = 0, kError = 1 } Status;
typedef struct { int size; int data[]; } IntArray;
struct Delegate;

typedef struct {
  int type;
  union { float *f; void *raw; } data;
  IntArray *dims;
  struct { float scale; int32_t zero_point; } params;
  int allocation_type;
  size_t bytes;
  const void *allocation;
  const char *name;
  struct Delegate *delegate;
  int buffer_handle;
  _Bool data_is_stale, is_variable;
  struct { int type; void *params; } quantization;
  void *sparsity;
  const IntArray *dims_signature;
} Tensor;

typedef struct { IntArray *inputs, *outputs, *intermediates, *temporaries; void *user_data; } Node;

typedef struct Context {
  size_t tensors_size;
  Status (*GetExecutionPlan)(struct Context *, IntArray **);
  Tensor *tensors;
  void *impl;
  Status (*ResizeTensor)(struct Context *, Tensor *, IntArray *);
  void (*ReportError)(struct Context *, const char *, ...);
  Status (*AddTensors)(struct Context *, int, int *);
  Status (*GetNodeAndRegistration)(struct Context *, int, Node **, void **);
  Status (*ReplaceNodeSubsetsWithDelegateKernels)();
} Context;

typedef struct {
  void *(*init)(Context *, const char *, size_t);
  void (*free)(Context *, void *);
  Status (*prepare)(Context *, Node *);
  Status (*invoke)(Context *, Node *);
  const char *(*profiling_string)(const Context *, const Node *);
  int32_t builtin_code;
  const char *custom_name;
  int version;
  void *external, *async_kernel;
  uint64_t inplace_operator;
} Registration;

typedef struct Delegate {
  void *data;
  Status (*Prepare)(Context *, struct Delegate *);
  void *copy_from, *copy_to, *free_handle;
  int64_t flags;
  void *builder;
} Delegate;

typedef struct { struct Delegate *delegate; IntArray *nodes, *inputs, *outputs; } Params;
typedef struct { Delegate base; float offset; int fail_prepare, fail_run; } Adder;
/* The ADDs of one part, in order. */
typedef struct { Adder *adder; int count; struct { int a, b, out; } *adds; } Part;

enum { ADD = 0 };

static void *part_init(Context *context, const char *buffer, size_t size) {
  const Params *params = (const Params *)buffer;
  Part *part = calloc(1, sizeof *part);
  part->adder = params->delegate->data;
  part->count = params->nodes->size;
  part->adds = calloc(part->count, sizeof *part->adds);
  for (int i = 0; i < part->count; i++) {
    Node *node; void *registration;
    context->GetNodeAndRegistration(context, params->nodes->data[i], &node, &registration);
    part->adds[i].a = node->inputs->data[0];
    part->adds[i].b = node->inputs->data[1];
    part->adds[i].out = node->outputs->data[0];
  }
  return part;
}

static void part_free(Context *context, void *data) {
  free(((Part *)data)->adds);
  free(data);
}

static Status part_prepare(Context *context, Node *node) {
  Part *part = node->user_data;
  for (int i = 0; i < part->count; i++) {
    const IntArray *dims = context->tensors[part->adds[i].a].dims;
    size_t size = sizeof(int) * (dims->size + 1);
    IntArray *copy = malloc(size); /* ResizeTensor takes it over */
    memcpy(copy, dims, size);
    if (context->ResizeTensor(context, &context->tensors[part->adds[i].out], copy)) return kError;
  }
  return kOk;
}

static Status part_run(Context *context, Node *node) {
  Part *part = node->user_data;
  if (part->adder->fail_run) {
    context->ReportError(context, "the accelerator stopped answering");
    return kError;
  }
  for (int i = 0; i < part->count; i++) {
    Tensor *a = &context->tensors[part->adds[i].a], *b = &context->tensors[part->adds[i].b];
    Tensor *out = &context->tensors[part->adds[i].out];
    for (size_t k = 0; k < out->bytes / sizeof(float); k++)
      out->data.f[k] = a->data.f[k] + b->data.f[k] + part->adder->offset;
  }
  return kOk;
}

static Status prepare(Context *context, Delegate *delegate) {
  Adder *adder = delegate->data;
  if (adder->fail_prepare) {
    context->ReportError(context, "the accelerator's firmware is too old");
    return kError;
  }
  IntArray *plan;
  if (context->GetExecutionPlan(context, &plan)) return kError;
  IntArray *mine = malloc(sizeof(int) * (plan->size + 1));
  mine->size = 0;
  for (int i = 0; i < plan->size; i++) {
    Node *node; void *registration;
    if (context->GetNodeAndRegistration(context, plan->data[i], &node, &registration)) continue;
    if (((Registration *)registration)->builtin_code == ADD) mine->data[mine->size++] = plan->data[i];
  }
  Registration part = {part_init, part_free, part_prepare, part_run, 0, 0, "TestAdder", 1};
  Status (*replace)(Context *, Registration, const IntArray *, Delegate *) =
      (void *)context->ReplaceNodeSubsetsWithDelegateKernels;
  Status status = replace(context, part, mine, delegate);
  free(mine);
  return status;
}

Delegate *tflite_plugin_create_delegate(char **keys, char **values, size_t count,
                                        void (*report)(const char *)) {
  Adder *adder = calloc(1, sizeof *adder);
  for (size_t i = 0; i < count; i++) {
    if (!strcmp(keys[i], "offset")) adder->offset = strtof(values[i], 0);
    if (!strcmp(keys[i], "device") && open(values[i], O_RDWR) < 0) {
      report("the device cannot be opened");
      free(adder);
      return 0;
    }
    if (strcmp(keys[i], "fail")) continue;
    if (!strcmp(values[i], "create")) { report("no accelerator is plugged in"); free(adder); return 0; }
    adder->fail_prepare = !strcmp(values[i], "prepare");
    adder->fail_run = !strcmp(values[i], "run");
  }
  adder->base.data = adder;
  adder->base.Prepare = prepare;
  adder->base.flags = 1; /* kTfLiteDelegateFlagsAllowDynamicTensors */
  return &adder->base;
}

void tflite_plugin_destroy_delegate(Delegate *delegate) { free(delegate); }
