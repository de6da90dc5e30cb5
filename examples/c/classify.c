/* Runs a model on raw little-endian bytes from a file (or "-") and prints the three largest values of
 * its first output, which must be FP32.
 *
 *     cc -std=c99 -Wall -Wextra -O2 -o classify classify.c edge_client.c
 *     ./classify /run/edge-runtime/infer.sock fashion input FP32 1,1,28,28 image.f32 \
 *         [--region] [--key KEY]
 *
 * With --region input and output travel by shared memory; with --key, the same version answers all
 * requests of that key while two share the traffic.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edge_client.h"

enum { ROOM = 1 << 20 }; /* bytes for the output, with --region */

static size_t read_file(const char *path, void *to, size_t room)
{
    FILE *file = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    if (!file) {
        perror(path);
        exit(2);
    }
    size_t size = fread(to, 1, room, file);
    fclose(file);
    return size;
}

static int parse_shape(const char *text, int64_t *shape)
{
    int dimensions = 0;
    char *end = NULL;
    for (; dimensions < EDGE_DIMENSIONS_MAX; text = end + 1) {
        shape[dimensions++] = strtoll(text, &end, 10);
        if (*end != ',')
            break;
    }
    return dimensions;
}

static void print_best(const edge_tensor *output)
{
    const char *bytes = output->data; /* not aligned for float in the frame: copied one by one */
    size_t count = output->size / sizeof(float), shown[3];
    printf("%s %s %zu values\n", output->name, output->datatype, count);
    for (size_t rank = 0; rank < 3 && rank < count; rank++) {
        float best = 0;
        size_t best_index = count;
        for (size_t i = 0; i < count; i++) {
            float value;
            int before = 0;
            memcpy(&value, bytes + i * sizeof value, sizeof value);
            for (size_t k = 0; k < rank; k++)
                before |= shown[k] == i;
            if (!before && (best_index == count || value > best)) {
                best = value;
                best_index = i;
            }
        }
        if (best_index == count)
            return;
        shown[rank] = best_index;
        printf("%zu %g\n", best_index, (double)best);
    }
}

int main(int argc, char **argv)
{
    int64_t shape[EDGE_DIMENSIONS_MAX];
    if (argc < 7) {
        fprintf(stderr, "usage: %s SOCKET MODEL INPUT DATATYPE SHAPE FILE [--region] [--key KEY]\n",
                argv[0]);
        return 2;
    }
    const char *model = argv[2], *key = "";
    int by_region = 0;
    for (int i = 7; i < argc; i++) {
        if (!strcmp(argv[i], "--region"))
            by_region = 1;
        else if (!strcmp(argv[i], "--key") && i + 1 < argc)
            key = argv[++i];
    }
    size_t room = (size_t)64 << 20;
    edge_client *client = edge_connect(argv[1]);
    if (!client) {
        perror(argv[1]);
        return 6;
    }
    void *memory = by_region ? NULL : malloc(room);
    int result = edge_routing_key(client, key);
    if (!result && by_region)
        result = edge_region(client, model, 0, room, &memory, 5.0);
    edge_tensor input, wanted, outputs[EDGE_TENSORS_MAX];
    int outputs_count = EDGE_TENSORS_MAX;
    if (!result && memory) {
        size_t size = read_file(argv[6], memory, by_region ? room - ROOM : room);
        result = edge_tensor_set(&input, argv[3], argv[4], parse_shape(argv[5], shape), shape,
                                 memory, size);
        input.region = by_region ? 0 : -1;
    }
    if (!result)
        result = edge_infer(client, model, &input, 1, NULL, 0, outputs, &outputs_count, 5.0);
    if (!result && by_region) { /* now the output's name is known: ask for it in shared memory */
        edge_tensor_set(&wanted, outputs[0].name, "", 0, NULL, NULL, ROOM);
        wanted.region = 0;
        wanted.offset = room - ROOM;
        outputs_count = EDGE_TENSORS_MAX;
        result = edge_infer(client, model, &input, 1, &wanted, 1, outputs, &outputs_count, 5.0);
    }
    if (result)
        fprintf(stderr, "%s\n", edge_error(client));
    else
        print_best(&outputs[0]);
    if (!by_region)
        free(memory);
    edge_close(client);
    return result ? 1 : 0;
}
